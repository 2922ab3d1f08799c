"""Batches on their way to the device. What needs a GPU is marked so."""

from collections.abc import Generator
from dataclasses import replace

import pytest
import torch

from p2r.config import ImageConfig
from p2r.data.batch import Batch
from p2r.data.stream import StreamState
from p2r.engine.feed import feed
from p2r.planning.tune_batch import noise_batch


class Source:
    """Batches whose positions are their numbers, and what became of their generator."""

    def __init__(self, image: ImageConfig) -> None:
        self.num_taken, self.is_closed, self._image = 0, False, image

    def batches(self) -> Generator[tuple[Batch, StreamState], None, None]:
        state = StreamState(corpora=(), seed=0, global_batch=2)
        try:
            while True:
                self.num_taken += 1
                state = replace(state, step=state.step + 1)
                yield replace(noise_batch(self._image, 2), wait_s=0.5, num_ready=state.step), state
        finally:
            self.is_closed = True


def test_on_a_cpu_batches_pass_through() -> None:
    source = Source(ImageConfig(size=8))
    batches = source.batches()
    assert feed(batches, torch.device("cpu")) is batches


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dimensions", [2, 3])
def test_on_a_gpu_every_batch_comes_copied_with_its_own_state(dimensions: int) -> None:
    source = Source(ImageConfig.model_validate({"size": 8, "dimensions": dimensions}))
    fed = feed(source.batches(), torch.device("cuda"))
    for number in range(1, 8):
        batch, state = next(fed)
        assert (state.step, batch.num_ready, source.num_taken) == (number, number, number)
        assert all(group.voxels.is_cuda and group.low.is_cuda for group in batch.groups)
        ours, inside = batch.images("cuda")
        theirs, _ = noise_batch(batch.image, 2).images()
        torch.testing.assert_close(ours.cpu(), theirs)
        assert inside.all()
    fed.close()
    assert source.is_closed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("loss", [{}, {"learn_temperature": True}, {"name": "barlow_twins"}])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_step_never_waits_for_its_gpu(dimensions: int, loss: dict[str, object]) -> None:
    from p2r.config import PretrainConfig
    from p2r.engine.build import build_engine, join_process_group
    from p2r.engine.step import take_step
    from p2r.model.pix2rep import Pix2Rep

    config = PretrainConfig.model_validate(
        {
            "image": {"size": 32, "dimensions": dimensions},
            "model": {"name": "unet", "channels": [8, 8, 16], "feature_channels": 8, "embedding_channels": 16},
            "loss": {"pixel_pairs_per_image": 64, "foreground_share": 0.5, **loss},
            "views": "pix2rep_v2",
            "steps": 9,
            "global_batch": 2,
            "precision": "bf16",
        }
    )
    device = torch.device("cuda")
    join_process_group(device)
    temperature = config.loss.temperature if config.loss.learn_temperature else None
    model = Pix2Rep(config.model, dimensions=dimensions, learnt_temperature=temperature).to(device)
    engine = build_engine(model, config, world_size=1)
    fed = feed(Source(config.image).batches(), device)
    for number in range(6):
        if number == 3:
            torch.cuda.set_sync_debug_mode("error")
        try:
            batch, _ = next(fed)
            taken = take_step(engine, batch, config=config, learning_rate=1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(taken.loss)
    fed.close()
    engine.destroy()
