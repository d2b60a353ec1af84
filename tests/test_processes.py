"""Which process of a training this is, and what it takes; tests/distributed has several of them train."""

import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from mnist_vae.errors import UserError
from mnist_vae.training import processes as processes_module
from mnist_vae.training import strategies
from mnist_vae.training.data_module import CHUNK, Chunks, share_of_each
from mnist_vae.training.fit import fit
from mnist_vae.training.processes import Place, Processes, ProcessLostError, Share, place, processes
from stages.stage import is_first_process
from tests.training import CONFIG, settings, weights

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}


@pytest.fixture
def images(digits_dataset):
    return digits_dataset.x_train[::97][:100]


# shares


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("images", [1, 2, 7, 16])
def test_shares_are_the_images_in_their_order_each_once(images, count):
    shares = [Share(rank, count) for rank in range(count)]
    parts = [share.of(torch.arange(images)) for share in shares]

    assert torch.cat(parts).tolist() == list(range(images))
    assert [len(part) for part in parts] == [share.size(images) for share in shares]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_each_mini_batch_of_an_epoch_and_see_no_image_twice(count):
    numbers, batch_size = torch.arange(1_000)[:, None], 7  # 142 mini-batches and one of six, in five chunks

    def epoch(share):
        torch.manual_seed(1)
        return list(Chunks(numbers, batch_size * CHUNK, lambda: [torch.randperm(len(numbers))], share))

    whole, parts = epoch(Share()), [epoch(Share(rank, count)) for rank in range(count)]

    assert [len(part) for part in parts] == [len(whole)] * count
    for chunk, *shares in zip(whole, *parts, strict=True):
        left = [iter(share) for share in shares]
        for batch in chunk.split(batch_size):
            sizes = [Share(rank, count).size(len(batch)) for rank in range(count)]
            seen = [int(next(own)) for own, size in zip(left, sizes, strict=True) for _ in range(size)]
            assert seen == batch.flatten().tolist()
        assert [list(own) for own in left] == [[]] * count


def test_the_only_process_takes_mini_batches_as_they_are():
    images = torch.arange(10)
    assert share_of_each(images, 4, Share()) is images


# places


@pytest.mark.parametrize(
    ("changes", "env", "expected"),
    [
        ({}, {}, Place(0, 1, 0, 1, False)),
        ({}, {"WORLD_SIZE": "1", "RANK": "0"}, Place(0, 1, 0, 1, False)),
        ({"devices": 3}, {}, Place(0, 3, 0, 3, False)),
        ({"devices": 2, "nodes": 3}, {"MASTER_ADDR": "a"}, Place(0, 6, 0, 2, False)),
        ({"devices": 2, "nodes": 3}, {"MASTER_ADDR": "a", "NODE_RANK": "2"}, Place(4, 6, 0, 2, False)),
        ({}, TORCHRUN, Place(5, 6, 1, 2, True)),
        ({"devices": 4}, TORCHRUN, Place(5, 6, 1, 2, True)),
    ],
)
def test_parameters_give_a_process_its_place_unless_torchrun_does(changes, env, expected):
    assert place(settings(**changes), env) == expected


@pytest.mark.parametrize(
    ("changes", "env", "complaint"),
    [
        ({"nodes": 2}, {}, r"params\.yaml: train\.nodes is 2; set MASTER_ADDR"),
        ({"nodes": 2}, {"MASTER_ADDR": "a", "NODE_RANK": "2"}, r"NODE_RANK is 2 and params\.yaml: train\.nodes is 2"),
        ({"devices": 2}, {"NODE_RANK": "one"}, "NODE_RANK in the environment is 'one'; it must be a whole number"),
    ],
)
def test_an_environment_that_does_not_fit_is_named(changes, env, complaint):
    with pytest.raises(UserError, match=complaint):
        place(settings(**changes), env)


@pytest.mark.parametrize(
    ("env", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0", "NODE_RANK": "0"}, True),
        ({"RANK": "1", "LOCAL_RANK": "1"}, False),
        ({"RANK": "2", "LOCAL_RANK": "0"}, False),
        ({"NODE_RANK": "1"}, False),
    ],
)
def test_the_first_process_of_the_first_host_is_the_first(monkeypatch, env, first):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)

    assert is_first_process() == first


def test_a_single_process_starts_and_joins_nothing():
    with processes(settings(), ["false"]) as group:
        group.join({"anything": "at all"})

    assert not torch.distributed.is_initialized()
    assert group.children == []


def test_fit_refuses_to_be_alone_where_several_processes_are_asked_for(images):
    with pytest.raises(
        UserError, match=re.escape("train.devices is 2 and train.nodes 1, and this is the only process")
    ):
        fit(images, CONFIG, settings(devices=2))


def test_a_host_with_too_few_gpus_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    group = Processes(settings(devices=2, accelerator="auto"), [])
    group.store = torch.distributed.HashStore()

    with pytest.raises(UserError, match=re.escape("has 1 GPU(s) for 2 processes: lower train.devices")):
        group.join({})


# dividing the weights, and waiting for each other


@pytest.mark.parametrize(
    ("sizes", "count", "parts"),
    [([5, 1, 4], 1, [0, 0, 0]), ([5, 1, 4], 2, [0, 1, 1]), ([2, 3], 3, [1, 0]), ([4, 3, 3, 2], 2, [0, 1, 1, 0])],
)
def test_weights_are_divided_into_parts_of_about_equal_size(sizes, count, parts):
    assert strategies.equal_parts(sizes, count) == parts


@pytest.fixture
def strategy(monkeypatch):
    """That of the first of two processes, which have both come once."""
    monkeypatch.setattr(strategies, "LATE_S", 0.1)
    strategy = strategies.SharedMemoryStrategy()
    strategy.rank = 0
    strategy.arrivals = np.array([1, 1]).data
    strategy.pids = [os.getpid(), os.getpid()]
    return strategy


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.3])
def test_a_process_waits_until_the_other_has_come_as_often(strategy, seconds):
    def come():
        seen.append(list(strategy.arrivals))
        strategy.arrivals[1] = 2

    seen = []
    timer = threading.Timer(seconds, come)
    timer.start()
    strategy._wait_for_all()

    assert list(strategy.arrivals) == [2, 2]
    assert len(seen) == 1
    timer.join()


@pytest.mark.parametrize("is_reaped", [True, False])
def test_a_process_that_has_ended_is_not_waited_for(strategy, is_reaped):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        if is_reaped:
            ended.wait()
        strategy.pids[1] = ended.pid

        with pytest.raises(ProcessLostError, match="process 2 of 2 has ended"):
            strategy._wait_for_all()


def test_a_process_that_runs_is_not_waited_for_beyond_the_limit(strategy, monkeypatch):
    monkeypatch.setattr(strategies, "ANSWER_S", 0.3)

    with pytest.raises(ProcessLostError, match="process 2 of 2 has not answered for"):
        strategy._wait_for_all()


def test_a_lost_process_is_named_where_nothing_else_is_known(monkeypatch):
    monkeypatch.setattr(processes_module, "REASON_S", 0)
    group = Processes(settings(devices=2), [])

    named, unknown = (str(group.explain(error)) for error in (ProcessLostError("process 2 has ended"), OSError("gloo")))

    assert named.startswith("process 2 has ended; the training has ended on all hosts")
    assert unknown.startswith("a process, its host or the network between them is gone; the training has ended")


# precision


@pytest.mark.parametrize("changes", [{}, {"importance_samples": 3, "validation_size": 30}])
def test_layers_in_bfloat16_train_nearly_as_those_in_float32_do(images, changes):
    full, half = (
        fit(images, CONFIG, settings(epochs=3, precision=precision, **changes))
        for precision in ("32-true", "bf16-mixed")
    )

    for name in {"loss", "bce", "val_loss"} & full.losses.keys():
        assert half.losses[name] == pytest.approx(full.losses[name], rel=1e-3)
        assert half.losses[name] != full.losses[name]
    assert weights(half.vae).dtype == torch.float32
    # A sum in bfloat16 would have eight bits: hundreds of nats would be multiples of one or two.
    assert all(row["bce"] * 100 % 1 for row in half.history)
