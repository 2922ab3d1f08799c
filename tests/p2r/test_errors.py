import pickle

from p2r.errors import InputError, P2RError, RefusedScan, TrainingError


def test_the_tree_separates_the_user_s_input_from_the_rest() -> None:
    assert issubclass(RefusedScan, InputError)
    assert not issubclass(TrainingError, InputError)
    assert issubclass(TrainingError, P2RError)


def test_a_refusal_survives_the_way_between_processes() -> None:
    refused = pickle.loads(pickle.dumps(RefusedScan("truncated", "x.nii.gz ends early")))
    assert (refused.code, refused.message) == ("truncated", "x.nii.gz ends early")
    assert str(refused) == "x.nii.gz ends early [truncated]"
