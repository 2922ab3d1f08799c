from p2r.randomness import keyed_generator


def test_equal_keys_give_equal_streams_and_other_keys_others() -> None:
    def draw(*key: int | str) -> list[float]:
        return list(keyed_generator(*key).random(4))  # type: ignore[arg-type]

    assert draw(0, "views", 1, 2) == draw(0, "views", 1, 2)
    assert (
        len(
            {
                tuple(draw(*key))
                for key in [(0, "views", 1, 2), (1, "views", 1, 2), (0, "points", 1, 2), (0, "views", 12)]
            }
        )
        == 4
    )


def test_the_stream_of_a_key_never_changes() -> None:
    """A resumed run of an older version must go on with the same numbers."""
    assert keyed_generator(0, "views", 1, 2).integers(1000, size=4).tolist() == [14, 888, 710, 429]
