"""Images at different steps share calls, and no image depends on the others."""

import threading
import time

import numpy as np
import pytest

import trtq
from trtq.seeds import seeded_generator
from trtq.serve.batch import Item
from trtq.serve.batcher import Batcher, batch_sizes
from trtq.serve.hosting import open_model
from trtq.serve.models.base import GenerationRequest
from trtq.serve.models.pipeline import PipelineModel


class Crowd:
    """Images for a batcher, and their results."""

    def __init__(self, model):
        self.model = model
        self.done = {}
        self.order = []
        self.all_done = threading.Condition()

    def items(self, seed, steps=5, guidance=1.0, count=1, prompt="1", **wish):
        starts = self.model.starts(GenerationRequest(prompt, count, seed, steps, guidance, **wish))
        items = []
        for index, start in enumerate(starts):
            item = Item(start, index, None, self._finish)
            item.name = (seed, index)
            items.append(item)
        return items

    def _finish(self, item, error):
        with self.all_done:
            assert item.name not in self.done, "answered twice"
            self.done[item.name] = item.x if error is None else error
            self.order.append(item.name)
            self.all_done.notify()

    def wait(self, count, seconds=30):
        with self.all_done:
            assert self.all_done.wait_for(lambda: len(self.done) >= count, timeout=seconds)
        return self.done


@pytest.fixture
def start(toy):
    made = []

    def make(model=toy, **options):
        made.append(Batcher(model, **{"max_rows": 8} | options))
        return made[-1]

    yield make
    toy.go.set()
    for batcher in made:
        batcher.close(RuntimeError("closed"))


def test_requests_at_different_steps_share_calls(toy, start):
    toy.go.clear()
    batcher, crowd = start(), Crowd(toy)
    batcher.put(crowd.items(1, steps=5))
    batcher.put(crowd.items(2, steps=3))
    batcher.put(crowd.items(3, steps=2, guidance=2.0))
    toy.go.set()
    crowd.wait(3)
    # The first call may begin before the other images arrive; later calls contain all of them.
    together = [call for call in toy.calls if len(call) == 4]
    assert together
    assert len(toy.calls) <= 6
    assert len(set(together[-1])) >= 2


def test_an_image_joins_at_the_next_call_and_leaves_when_done(toy, start):
    batcher, crowd = start(), Crowd(toy)
    late = crowd.items(2, steps=2)

    def on_step(item):
        if item.position == 3:
            batcher.put(late)

    (first,) = crowd.items(1, steps=8)
    first.on_step = on_step
    batcher.put([first])
    crowd.wait(2)
    assert [len(call) for call in toy.calls] == [1, 1, 1, 2, 2, 1, 1, 1]
    assert crowd.order == [(2, 0), (1, 0)]


@pytest.mark.parametrize("sizes", [None, (8,), (1, 2, 4, 8)], ids=str)
def test_an_image_does_not_depend_on_its_batch(toy, start, sizes):
    alone = {}
    for seed in range(6):
        crowd = Crowd(toy)
        batcher = start(sizes=sizes)
        batcher.put(crowd.items(seed, steps=2 + seed, guidance=1.0 + seed % 2))
        alone |= crowd.wait(1)
    crowd, batcher = Crowd(toy), start(sizes=sizes)
    for seed in range(6):
        batcher.put(crowd.items(seed, steps=2 + seed, guidance=1.0 + seed % 2))
    together = crowd.wait(6)
    for name, x in alone.items():
        np.testing.assert_array_equal(together[name], x)
    assert len({x.tobytes() for x in together.values()}) == 6


@pytest.mark.parametrize("provider", ["cpu", "openvino"])
def test_a_low_bit_graph_gives_the_same_bits_alone_and_in_a_batch(served_onnx, provider):
    model = open_model(str(served_onnx), "tiny", provider=provider)
    requests = [(seed, 2 + seed % 5, 1.0 + 2 * (seed % 2)) for seed in range(9)]

    def draw(chosen):
        crowd, batcher = Crowd(model), Batcher(model, max_rows=4, sizes=[4])
        for seed, steps, guidance in chosen:
            batcher.put(crowd.items(seed, steps, guidance))
        drawn = crowd.wait(len(chosen))
        batcher.close(RuntimeError("closed"))
        return drawn

    together = draw(requests)
    for request in requests:
        ((name, x),) = draw([request]).items()
        np.testing.assert_array_equal(together[name], x)
        assert np.abs(x).max() > 0.1


def drawn_by_both(model, pipeline, steps, guidance):
    """Three images of class 2 from the batcher and from the pipeline itself, [3,C,H,W] each."""
    crowd, batcher = Crowd(model), Batcher(model, max_rows=4)
    batcher.put(crowd.items(5, steps, guidance, count=3, prompt="2"))
    samples = crowd.wait(3)
    batcher.close(RuntimeError("closed"))
    expected = pipeline(
        [2, 2, 2],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[seeded_generator(5, "image", index) for index in range(3)],
        output_type="pt",
    ).images.numpy()
    return np.concatenate([samples[5, index] for index in range(3)]), expected


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_the_batcher_draws_the_images_of_the_pipeline(tiny, scheduler, guidance):
    import diffusers

    pipeline = tiny.pipeline
    cls = getattr(diffusers, scheduler)
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config)
    model = PipelineModel(tiny, "tiny", "torch")
    drawn, expected = drawn_by_both(model, pipeline, 7, guidance)
    np.testing.assert_allclose(drawn, expected, atol=1e-4)


def test_a_graph_without_torch_draws_the_images_of_its_pipeline(served_onnx):
    # Only one step, because an untrained 4-bit network amplifies differences in the last bit.
    model = open_model(str(served_onnx), "tiny")
    assert type(model).__name__ == "TorchFreeModel"
    drawn, expected = drawn_by_both(model, trtq.load(served_onnx), 1, 3.0)
    np.testing.assert_allclose(drawn, expected, atol=1e-4)


def test_batches_are_padded_to_the_given_sizes(toy, start):
    sizes = set()
    denoise = toy.denoise
    toy.denoise = lambda x, *rest: (sizes.add(len(x)), denoise(x, *rest))[1]
    batcher, crowd = start(sizes=(2, 4)), Crowd(toy)
    toy.go.clear()
    for seed in range(7):
        batcher.put(crowd.items(seed, steps=2 + seed))
    toy.go.set()
    crowd.wait(7)
    assert sizes == {2, 4}


def test_a_size_added_later_is_used(toy, start):
    toy.go.clear()
    batcher, crowd = start(sizes=(1,)), Crowd(toy)
    for seed in range(4):
        batcher.put(crowd.items(seed, steps=4))
    pair = crowd.items(9, steps=2, guidance=2.0)
    batcher.put(pair)
    batcher.add_size(4)
    toy.go.set()
    crowd.wait(5)
    assert max(len(call) for call in toy.calls) == 4


def test_an_image_that_fits_in_no_size_waits_for_a_larger_size(toy, start):
    batcher, crowd = start(sizes=(1,), more_sizes=True), Crowd(toy)
    batcher.put(crowd.items(1, steps=2, guidance=2.0))
    time.sleep(0.1)  # Now the thread is waiting, and only `add_size` can wake it.
    assert (batcher.waiting, crowd.done) == (1, {})
    batcher.add_size(2)
    assert isinstance(crowd.wait(1)[1, 0], np.ndarray)
    assert batcher.waiting == 0


def test_an_image_fails_if_no_larger_size_will_follow(toy, start):
    batcher, crowd = start(sizes=(1,), more_sizes=True), Crowd(toy)
    batcher.put(crowd.items(1, guidance=2.0))
    batcher.no_more_sizes()
    batcher.put(crowd.items(2, guidance=2.0))
    batcher.put(crowd.items(3))
    done = crowd.wait(3)
    assert "could be compiled" in str(done[1, 0])
    assert "could be compiled" in str(done[2, 0])
    assert isinstance(done[3, 0], np.ndarray)


def test_a_failing_callback_affects_its_image_only(toy, start, caplog):
    batcher, crowd = start(), Crowd(toy)

    def fail(*_):
        raise ValueError("nobody home")

    (silent,) = crowd.items(1, steps=2)
    silent.on_done = fail
    (failing,) = crowd.items(2, steps=3)
    failing.on_step = fail
    toy.go.clear()
    batcher.put([silent, failing, *crowd.items(3, steps=4)])
    toy.go.set()
    done = crowd.wait(2)
    assert isinstance(done[2, 0], ValueError)
    assert isinstance(done[3, 0], np.ndarray)
    assert batcher.alive
    assert "could not be answered" in caplog.text


def test_close_does_not_wait_for_a_call_that_hangs(toy, start):
    toy.go.clear()
    batcher, crowd = start(), Crowd(toy)
    batcher.put(crowd.items(1))
    while batcher.waiting:
        time.sleep(0.01)
    assert not batcher.close(RuntimeError("stop"), seconds=0.1)
    assert str(crowd.wait(1)[1, 0]) == "stop"
    toy.go.set()
    assert batcher.close(RuntimeError("stop"))
    assert list(crowd.done) == [(1, 0)]


def test_a_large_request_does_not_delay_a_small_request(toy, start):
    batcher, crowd = start(max_rows=2), Crowd(toy)
    toy.go.clear()
    batcher.put(crowd.items(1, steps=4, count=8))
    batcher.put(crowd.items(2, steps=4))
    toy.go.set()
    crowd.wait(9)
    assert crowd.order.index((2, 0)) <= 2
    assert [name for name in crowd.order if name[0] == 1] == [(1, index) for index in range(8)]


def test_no_image_waits_forever_behind_later_images(toy, start):
    batcher, crowd = start(max_rows=2), Crowd(toy)
    seeds = iter(range(1, 40))

    def another(*_):
        # Each image is followed by another request, so the queue never becomes empty.
        seed = next(seeds, None)
        if seed is not None:
            (item,) = crowd.items(seed, steps=2)
            item.on_step = another
            batcher.put([item])

    toy.go.clear()
    batcher.put(crowd.items(0, steps=2, count=4))
    for _ in range(4):
        another()
    toy.go.set()
    crowd.wait(43)
    assert crowd.order.index((0, 3)) < 25


def test_cancelled_images_leave_and_are_not_answered(toy, start):
    toy.go.clear()
    batcher, crowd = start(), Crowd(toy)
    gone, stays = crowd.items(1, steps=50), crowd.items(2, steps=3)
    batcher.put([*gone, *stays])
    gone[0].cancelled = True
    toy.go.set()
    assert set(crowd.wait(1)) == {(2, 0)}
    assert len(toy.calls) <= 4


def test_a_failing_call_fails_its_images_and_no_others(toy, start, caplog):
    batcher, crowd = start(), Crowd(toy)
    toy.fail = ValueError("out of order")
    batcher.put(crowd.items(1))
    assert isinstance(crowd.wait(1)[1, 0], ValueError)
    toy.fail = None
    batcher.put(crowd.items(2))
    assert isinstance(crowd.wait(2)[2, 0], np.ndarray)
    assert "a call of the denoiser failed" in caplog.text


def test_refusing_finishes_each_image_once(toy, start):
    toy.go.clear()
    batcher, crowd = start(), Crowd(toy)
    batcher.put(crowd.items(1, count=3))
    batcher.refuse(RuntimeError("stop"))
    batcher.put(crowd.items(2))
    assert {str(error) for error in crowd.wait(4).values()} == {"stop"}
    toy.go.set()


def test_with_request_batching_no_image_joins_a_batch(toy, start):
    toy.go.clear()
    batcher, crowd = start(batching="request"), Crowd(toy)
    batcher.put(crowd.items(0, steps=1))
    for seed, steps in ((1, 4), (2, 4), (3, 2), (4, 4)):
        batcher.put(crowd.items(seed, steps=steps))
    toy.go.set()
    crowd.wait(5)
    assert [len(call) for call in toy.calls] == [1, 3, 3, 3, 3, 1, 1]
    assert all(len(set(call)) == 1 for call in toy.calls)


def test_batch_sizes_are_powers_of_two_up_to_the_maximum():
    assert batch_sizes(8) == (1, 2, 4, 8)
    assert batch_sizes(6) == (1, 2, 4, 6)
    assert batch_sizes(2) == (1, 2)
