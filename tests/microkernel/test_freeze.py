"""Freeze and thaw: same graph, same decisions, and nothing but a typed error whatever comes in."""

from __future__ import annotations

import contextlib
import random
import tracemalloc
from array import array
from collections import OrderedDict, deque
from types import MethodType

import msgspec
import numpy as np
import pytest
from flight_world import Twins, live, make_world
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmos.codes import FinishReason, SeqState
from llmos.errors import LlmosError, ProtocolError
from llmos.microkernel import graph
from llmos.microkernel.freeze import FreezeError, TooLarge, freeze
from llmos.microkernel.graph import FORMAT, Column, Kind
from llmos.microkernel.jobs import Job
from llmos.microkernel.pages import PagePool
from llmos.microkernel.sender import Sender
from llmos.microkernel.sequence import Sequence
from llmos.microkernel.thaw import find_class, thaw
from llmos.protocol import messages as m
from llmos.protocol.params import SamplingParams


def bare(cls, **values):
    """An instance with these attributes and no others; what kind of values they are does not matter here."""
    made = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def attributes(obj):
    names = graph.layout_of(type(obj)).slots
    return {name: getattr(obj, name) for name in [*names, *getattr(obj, "__dict__", ())] if hasattr(obj, name)}


def same(left, right, met):
    """Are two graphs the same, with every object on the left standing for exactly one on the right?"""
    if type(left) is not type(right):
        return False
    if type(left) in graph.PLAIN or isinstance(left, (msgspec.Struct, np.generic)):
        return left == right or left != left
    if isinstance(left, (type, FinishReason, SeqState)):
        return left is right
    if id(left) in met:
        return met[id(left)] is right
    met[id(left)] = right
    if isinstance(left, dict):
        pairs = [*zip(left, right), *zip(left.values(), right.values())]
    elif isinstance(left, (set, frozenset)):
        return left == right
    elif isinstance(left, (list, tuple, deque)):
        if getattr(left, "maxlen", 0) != getattr(right, "maxlen", 0):
            return False
        pairs = list(zip(left, right))
    elif isinstance(left, array):
        return left.typecode == right.typecode and left == right
    elif isinstance(left, np.ndarray):
        alike = (
            left.dtype == right.dtype and left.shape == right.shape and left.flags.writeable == right.flags.writeable
        )
        return alike and bool((left == right).all())
    elif isinstance(left, MethodType):
        return left.__func__ is right.__func__ and same(left.__self__, right.__self__, met)
    else:
        mine, theirs = attributes(left), attributes(right)
        if list(mine) != list(theirs):
            return False
        pairs = list(zip(mine.values(), theirs.values()))
    return (not hasattr(left, "__len__") or len(left) == len(right)) and all(same(a, b, met) for a, b in pairs)


def assert_survives(obj):
    data = freeze(obj)
    assert same(obj, thaw(data), {})
    return data


# ------------------------------------------------------------ graphs

PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(1 << 70), 1 << 130), st.floats(), st.text(max_size=5),
    st.binary(max_size=5),
)  # fmt: skip
KEYS = st.one_of(st.integers(-3, 1 << 66), st.text(max_size=2), st.tuples(st.integers(), st.text(max_size=2)))


@st.composite
def graphs(draw):
    """Nodes of all kinds that refer to each other at random, to themselves too."""
    tall = draw(st.lists(PLAIN, max_size=3))
    nodes = [
        [], {}, OrderedDict(), deque(maxlen=draw(st.sampled_from([None, 4]))), bare(Job), bare(PagePool), tall,
        array(draw(st.sampled_from("iqd")), [1, 2]), SamplingParams(seed=draw(st.integers(0, 9))), FinishReason.STOP,
        np.arange(draw(st.integers(0, 6))).astype(draw(st.sampled_from(["?", "<i4", "<i8", "<f8"]))), m.Kill, SeqState.BLOCKED,
        Sender(draw(st.integers(0, 9)), "gateway", "x"), set(draw(st.lists(KEYS, max_size=4))), np.int64(3), np.float64(0.5),
        frozenset(draw(st.lists(KEYS, max_size=4))),
    ]  # fmt: skip
    some = st.integers(0, len(nodes) - 1)
    for _ in range(draw(st.integers(0, 3))):
        nodes.append(
            tuple(draw(PLAIN) if draw(st.booleans()) else nodes[draw(some)] for _ in range(draw(st.integers(0, 3))))
        )
    nodes.append(bare(PagePool, cached=1).share)  # a bound method of an object of the graph

    def value():
        return draw(PLAIN) if draw(st.booleans()) else nodes[draw(some)]

    for node in nodes:
        if isinstance(node, list | deque):
            node.extend(value() for _ in range(draw(st.integers(0, 3))))
        elif isinstance(node, dict):
            node.update((draw(KEYS), value()) for _ in range(draw(st.integers(0, 3))))
        elif isinstance(node, PagePool | Job):
            for name in draw(st.lists(st.sampled_from(["rid", "owner", "members", "tokens"]), unique=True)):
                setattr(node, name, value())
    return nodes if draw(st.booleans()) else value()


@settings(max_examples=300, deadline=None)
@given(graphs())
def test_any_graph_survives(nodes):
    assert_survives(nodes)


def test_identity_and_cycles():
    log = array("i", [1, 2])
    job = Job(1, "alice")
    seq = bare(Sequence, rid=7, tokens=log, job=job, page_hashes=[b"x"])
    job.members[7] = seq
    ring = [seq, log]
    ring.append((ring, seq))
    again = thaw(freeze({"ring": ring, "heap": [(0.5, 7, seq)], "log": log}))
    twin = again["ring"][0]
    assert twin is again["heap"][0][2] is again["ring"][2][1] is twin.job.members[7]
    assert twin.tokens is again["log"] is again["ring"][1]
    assert again["ring"][2][0] is again["ring"]
    again["log"].append(3)
    assert list(twin.tokens) == [1, 2, 3]
    assert not hasattr(twin, "owner")


def test_order_and_types_are_kept():
    ages = OrderedDict.fromkeys([5, 1, 3])
    ages.move_to_end(5)
    again = thaw(freeze([{3: 1, 1: 2, "b": 0, "a": 1}, ages, deque([3, 1, 2], maxlen=5), True, 1, 1.0, 1 << 127]))
    assert list(again[0]) == [3, 1, "b", "a"]
    assert list(again[1]) == [1, 3, 5]
    assert type(again[1]) is OrderedDict
    assert (again[2], again[2].maxlen) == (deque([3, 1, 2]), 5)
    assert [type(value) for value in again[3:]] == [bool, int, float, int]
    assert again[6] == 1 << 127


def test_views_go_on_sharing_their_memory():
    whole = np.arange(12, dtype=np.int64).reshape(3, 4)
    again = thaw(freeze([whole, whole[1], whole[:, 2], whole[::-1, ::2], whole.T[1:]]))
    again[0].base[:] = 7
    assert [part.tolist() for part in again[1:]] == [[7] * 4, [7] * 3, [[7, 7]] * 3, [[7] * 3] * 3]
    read_only = np.frombuffer(b"\1\0\0\0\2\0\0\0", "<i4").reshape(2, 1)
    assert thaw(freeze([read_only]))[0].tolist() == [[1], [2]]


def test_methods_belong_to_the_new_objects():
    pool = PagePool(4, list().append.__self__.count)  # type: ignore[arg-type]
    pool._on_evict = pool.know
    again = thaw(freeze(pool))
    assert again._on_evict.__self__ is again
    assert again._on_evict.__func__ is PagePool.know
    assert again.grant(2) == [0, 1]


def test_nothing_of_theirs_runs(monkeypatch):
    seq = bare(Sequence, rid=1)
    data = freeze(seq)
    for name in ("__init__", "__post_init__", "__setattr__"):
        monkeypatch.setattr(Sequence, name, lambda *_: pytest.fail("it ran"), raising=False)
    assert thaw(data).rid == 1


# ------------------------------------------------------------ what can not be frozen


class _Foreign:
    pass


@pytest.mark.parametrize(
    ("thing", "text"),
    [
        (lambda: 1, "objects of builtins.function can not be frozen"),
        (iter([]), "objects of builtins.list_iterator can not be frozen"),
        (_Foreign(), "_Foreign can not be frozen"),
        (_Foreign, "_Foreign can not be frozen"),
        (np.zeros(3, np.float32), "an array of float32 can not be frozen"),
        (np.array([None]), "an array of object can not be frozen"),
        (np.frombuffer(bytearray(8), np.int64), "an array over memory of something else can not be frozen"),
        (np.float32(1), "a number of float32 can not be frozen"),
        (array("u", "x"), "an array of 'u' can not be frozen"),
        ([].append, "objects of builtins.builtin_function_or_method can not be frozen"),
        (random.Random().random, "objects of builtins.builtin_function_or_method can not be frozen"),
        (MethodType(len, []), "len is no method of list"),
        (m.PsGet(1, np.int64(3)), "Encoding objects of type numpy.int64 is unsupported"),
        ("\ud800", "surrogates not allowed"),
        ({m.PsGet: {Job: 1}, bare(Sequence): bytearray()}, "objects of builtins.bytearray can not be frozen"),
        (FinishReason, None),
    ],
)
def test_a_refusal_says_where_the_thing_hangs(thing, text):
    kernel = bare(PagePool, refs={"demo": [0, (bare(Job, owner=thing), 2)]})
    if text is None:
        assert_survives(kernel)
        return
    with pytest.raises(FreezeError) as caught:
        freeze(kernel)
    assert isinstance(caught.value, LlmosError)
    path, _, problem = caught.value.message.partition(": ")
    assert path.startswith("pagepool.refs['demo'][1][0].owner")
    assert text in problem


@pytest.mark.parametrize(
    ("key", "ok"),
    [
        (bare(Job), True), (Sender(1, "a", "b"), True), ((1, ("a", SeqState.BLOCKED)), True), (m.PsGet(1), True),
        (bare(Sender, peer=(), role="a", name="b", pid=0), False), (tuple(range(2000)), False), (np.int64(3), False),
    ],
)  # fmt: skip
def test_keys(key, ok):
    if ok:
        again = thaw(freeze({key: 1}))
        assert list(again.values()) == [1]
        assert set(again) == {next(iter(again))}
    else:
        with pytest.raises(FreezeError, match="as a key"):
            freeze([{key: 1}])


def test_the_limit():
    nodes = [Job(i, "a") for i in range(1000)]
    assert freeze(nodes, limit=4000)
    with pytest.raises(TooLarge):
        freeze(nodes, limit=500)
    with pytest.raises(TooLarge):
        freeze([*list(range(100000)), []], limit=2000)


# ------------------------------------------------------------ hostile input


def packed(*blocks, count=None, root=0):
    total = sum(len(block[1]) for block in blocks) if count is None else count
    return msgspec.msgpack.encode([FORMAT, total, blocks, [Column.OBJECTS, [root]]])


def plain(*values):
    return [Column.PLAIN, list(values)]


def objects(*numbers):
    return [Column.OBJECTS, list(numbers)]


JOB = (Job.__module__, "Job")
SLOTS = list(graph.layout_of(Job).slots)
LEAF = [Kind.LIST, [0], [0], plain()]
DEEP = [Kind.TUPLE, list(range(1, 200)), [1] * 199, objects(*range(199))]
DEEP_BACKWARDS = [Kind.TUPLE, list(range(199)), [1] * 199, objects(*range(1, 200))]


@pytest.mark.parametrize(
    ("blocks", "text"),
    [
        ([[Kind.CLASS, [0], [("subprocess", "Popen")]]], "no class subprocess.Popen"),
        ([[Kind.CLASS, [0], [("llmos.microkernel.main", "Shell")]]], "no class llmos.microkernel.main.Shell"),
        ([[Kind.CLASS, [0], [("llmos.protocol.codec", "hashlib.sha256")]]], "no class"),
        ([[Kind.CLASS, [0], [("llmos.microkernel.jobs", "FinishReason")]]], "no class"),
        ([[Kind.CLASS, [0], [("llmos.microkernel.jobs", "ended_well")]]], "no class"),
        ([[Kind.CLASS, [0], [("llmos.microkernel.nowhere", "X")]]], "no class"),
        ([[Kind.INSTANCE, [0], "llmos.codes", "FinishReason", [], [], []]], "FinishReason is not a plain class"),
        ([[Kind.INSTANCE, [0], "llmos.microkernel.freeze", "FreezeError", [], [], []]], "is not a plain class"),
        ([[Kind.INSTANCE, [0], *JOB, ["rid"], ["rid"], [plain(1)]]], "Job has other fields"),
        ([[Kind.INSTANCE, [0], *JOB, SLOTS, ["__class__"], [plain(1)]]], "Job has impossible fields"),
        ([[Kind.INSTANCE, [0], *JOB, SLOTS, ["rid", "rid"], [plain(1), plain(2)]]], "Job has impossible fields"),
        ([[Kind.INSTANCE, [0], *JOB, SLOTS, ["rid"], [plain(1, 2)]]], "longer"),
        ([[Kind.STRUCT, [0], *JOB, [[]]]], "Job is not a message"),
        ([[Kind.STRUCT, [0], "llmos.protocol.messages.control", "PsGet", [[80, "x"]]]], "Expected `int`"),
        ([[Kind.ENUM, [0], "llmos.codes", "SeqState", ["__class__"]]], "KeyError"),
        ([[Kind.ENUM, [0], *JOB, ["x"]]], "Job is not an enumeration"),
        ([[Kind.LIST, [0], [0], plain()], [Kind.METHOD, [1], objects(0), ["append"]]], "list has no method 'append'"),
        (
            [[Kind.INSTANCE, [0], *JOB, SLOTS, [], []], [Kind.METHOD, [1], objects(0), ["__reduce__"]]],
            "Job has no method '__reduce__'",
        ),
        ([[Kind.TUPLE, [0], [1], objects(0)]], "a part of itself"),
        ([[Kind.TUPLE, [0, 1], [1, 1], objects(1, 0)]], "a part of itself"),
        ([LEAF, DEEP], "nested deeper than 100"),
        ([DEEP_BACKWARDS, [Kind.LIST, [199], [0], plain()]], "nested deeper than 100|RecursionError"),
        ([[Kind.LIST, [0, 0], [0, 0], plain()]], "there twice"),
        ([[Kind.LIST, [1, 2], [0, 0], plain()]], "IndexError"),
        ([[Kind.LIST, [-1], [0], plain()]], "negative"),
        ([[Kind.LIST, [0], [2], plain(1)]], "do not agree"),
        ([[Kind.LIST, [0], [-1], plain()]], "negative"),
        ([[Kind.LIST, [0], [1], [Column.PLAIN, [[]]]]], "plain column"),
        ([[Kind.LIST, [0], [1], [9, [1]]]], "no form 9"),
        ([[99, [0]]], "no kind 99"),
        ([[Kind.SET, [0], [1], objects(1)], [Kind.LIST, [1], [0], plain()]], "list is no key"),
        ([[Kind.DICT, [0], [2], plain(1, 1), plain(1, 2)]], "a key twice"),
        ([[Kind.DEQUE, [0], [2], plain(1, 1), [1]]], "longer than it may be"),
        ([[Kind.ARRAY, [0], ["u"], [4], [b"abcd"]]], "TypeError|ValueError"),
        ([[Kind.ARRAY, [0], ["i"], [4], [b"abc"]]], "ValueError"),
        ([[Kind.NDARRAY, [0], [["|O", [1], True, b"abcdefgh"]]]], "another type"),
        ([[Kind.NDARRAY, [0], [["<i8", [1 << 40], True, b"abcdefgh"]]]], "ValueError"),
        ([[Kind.NDARRAY, [0], [["<i8", [1] * 9, True, b"abcdefgh"]]]], "too many dimensions"),
        (
            [[Kind.NDARRAY, [0], [["<i8", [1], True, bytes(8)]]], [Kind.VIEW, [1], objects(0), [["<i8", [9], True, 0, [0]]]]],
            "a view is larger than its array",
        ),
        (
            [[Kind.NDARRAY, [0], [["<i8", [2], True, bytes(16)]]], [Kind.VIEW, [1], objects(0), [["<i8", [2], True, 8, [8]]]]],
            "ValueError",
        ),
        ([[Kind.BIG_INT, [0], ["0x" + "zz"]]], "ValueError"),
    ],
)  # fmt: skip
def test_hostile_graphs_are_refused(blocks, text):
    with pytest.raises(ProtocolError, match=text):
        thaw(packed(*blocks))


def test_keys_that_would_hash_for_ever_are_refused():
    blocks = [[Kind.TUPLE, list(range(60)), [2] * 59 + [0], objects(*(n // 2 + 1 for n in range(118)))]]
    blocks += [[Kind.DICT, [60], [1], objects(0), plain(1)]]
    with pytest.raises(ProtocolError, match="tuple is no key"):
        thaw(packed(*blocks, root=60))


@pytest.mark.parametrize(
    "data", [b"", b"\x94", b"\xdd\xff\xff\xff\xff", b"\xc1", b"\x91" * 100_000, b"[]", FORMAT.encode()]
)
def test_no_graph_at_all(data):
    with pytest.raises(ProtocolError, match="snapshot: "):
        thaw(data)


def test_another_format_is_named():
    with pytest.raises(ProtocolError, match="format 'llmos-graph-9'"):
        thaw(msgspec.msgpack.encode(["llmos-graph-9", 0, [], plain(1)]))


def test_names_must_be_of_loaded_modules_of_ours():
    assert find_class("llmos.microkernel.sequence", "Sequence") is Sequence
    for module, name in (("os", "PathLike"), ("llmos.microkernel.sequence", "array"), ("llmos.errors", "LlmosError")):
        with pytest.raises(LookupError):
            find_class(module, name)


def kernel_bytes(seed=5):
    world = make_world(seed)
    live(world, random.Random(seed), 120)
    return freeze(world.kernel)


DATA = kernel_bytes()


@settings(max_examples=250, deadline=None)
@given(st.integers(0, len(DATA) - 1), st.binary(min_size=0, max_size=6))
@example(0, b"\xdd\xff\xff\xff\xff")
def test_damaged_bytes_never_do_more_than_a_typed_error(place, junk):
    for damaged in (DATA[:place], DATA[:place] + junk + DATA[place + len(junk) :], DATA[:place] + junk + DATA[place:]):
        with contextlib.suppress(ProtocolError):
            thaw(damaged)


@settings(max_examples=400, deadline=None)
@given(st.randoms(use_true_random=False), st.one_of(PLAIN, st.integers(-2, 400), st.just([]), st.just([0])))
def test_well_formed_but_wrong_graphs_never_do_more_than_a_typed_error(rng, junk):
    tree = msgspec.msgpack.decode(DATA)
    node = tree
    while True:
        index = rng.randrange(len(node))
        if not isinstance(node[index], list) or not node[index] or rng.random() < 0.1:
            break
        node = node[index]
    node[index] = junk
    try:
        data = msgspec.msgpack.encode(tree)
    except OverflowError:
        return
    with contextlib.suppress(ProtocolError):
        thaw(data)


def test_memory_is_bounded_by_the_input():
    bombs = [
        packed([Kind.LIST, [0], [1 << 40], plain()]),
        packed([Kind.LIST, [0], [0], plain()], count=1 << 40),
        packed([Kind.DEQUE, [0], [0], plain(), [1 << 40]]),
        packed([Kind.NDARRAY, [0], [["<i8", [0, 1 << 50], True, b""]]]),
    ]
    tracemalloc.start()
    for bomb in bombs:
        with contextlib.suppress(ProtocolError):
            thaw(bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


# ------------------------------------------------------------ a kernel in the middle of its life


@pytest.mark.parametrize("seed", range(12))
def test_a_thawed_kernel_goes_on_deciding_the_same(seed):
    rng = random.Random(seed)
    world = make_world(seed)
    live(world, rng, rng.randint(20, 160))
    data = freeze(world.kernel)
    twins = world.kernel = Twins(world.kernel, thaw(data))
    twins.check()
    live(world, rng, 150)
    assert twins.calls > 150
    again = thaw(freeze(twins.second))  # what was thawed can be frozen
    world.kernel = Twins(twins.first, again)
    live(world, rng, 60)
    world.kernel.check()


def test_another_state_is_noticed():
    """The comparison itself can fail."""
    world = make_world(3)
    live(world, random.Random(3), 60)
    twin = thaw(freeze(world.kernel))
    twin.state.next_rid()
    world.kernel = Twins(world.kernel, twin)
    with pytest.raises(AssertionError):
        live(world, random.Random(4), 200)
