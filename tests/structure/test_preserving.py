"""Putting Python state back."""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from lit_wsl.structure.running import preserved_objects, preserved_rng, undisturbed


def test_generators_anywhere_inside_are_put_back():
    box = SimpleNamespace(
        a=np.random.default_rng(1),
        b=[np.random.RandomState(1), {"c": torch.Generator().manual_seed(1)}],
        d=SimpleNamespace(e=random.Random(1)),
    )

    def draw():
        generator = box.b[1]["c"]
        return (box.a.random(), box.b[0].rand(), torch.rand(1, generator=generator).item(), box.d.e.random())

    with preserved_objects(box):
        first = draw()
    assert draw() == first


def test_attributes_and_containers_are_put_back_in_place():
    inner = [1, 2]
    box = SimpleNamespace(count=0, items=inner, names={"a": 1}, tags={1}, last=deque([1], maxlen=2))
    with preserved_objects(box):
        box.count, box.new = 5, "x"
        box.items.append(3)
        box.names.pop("a")
        box.tags.add(2)
        box.last.extend([7, 8])
        box.items = []
    assert box == SimpleNamespace(count=0, items=[1, 2], names={"a": 1}, tags={1}, last=deque([1], maxlen=2))
    assert box.items is inner


def test_state_behind_a_bound_method_and_cycles_are_found():
    class Collate:
        calls = 0

        def __call__(self, items):
            self.calls += 1
            return items

        def method(self, items):
            return self(items)

    box = Collate()
    box.self = box
    with preserved_objects(box.method):
        box.method([1])
    assert box.calls == 0


def test_all_global_generators_are_put_back_after_an_error():
    def draw():
        return torch.rand(1).item(), random.random(), np.random.rand()

    try:
        with preserved_rng():
            first = draw()
            raise KeyError
    except KeyError:
        pass
    assert draw() == first


def test_what_belongs_to_the_process_is_left_alone():
    box = SimpleNamespace(logger=logging.getLogger("box"), lock=threading.Lock(), call=partial(sorted, key=None))
    with preserved_objects(box):
        late = logging.getLogger("made.meanwhile")
    assert logging.getLogger("made.meanwhile") is late


def test_state_behind_a_partial_is_found():
    box = SimpleNamespace(count=0)
    with preserved_objects(partial(print, box)):
        box.count = 3
    assert box.count == 0


def test_what_a_step_writes_down_in_its_module_is_forgotten_however_deep():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.meter, self.meters = SimpleNamespace(sum=0.0, seen=[]), {"train": SimpleNamespace(sum=0.0, seen=[])}
            self.nested, self.rows = {"a": {"b": []}}, [[], ({"n": 0},)]
            self.generators = [np.random.default_rng(1)]

        def forward(self, x):
            for meter in (self.meter, self.meters["train"]):
                meter.sum += 1.0
                meter.seen.append(1)
            self.nested["a"]["b"].append(1)
            self.rows[0].append(1)
            self.rows[1][0]["n"] += 1
            return self.generators[0].random()

        def notes(self):
            return repr((self.meter, self.meters, self.nested, self.rows))

    net = Net()
    before = net.notes()
    with undisturbed(net):
        first = net(None)
        assert net.notes() != before
    assert net.notes() == before
    assert net(None) == first
