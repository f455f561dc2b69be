"""The chunked scan against a per-token float64 recurrence, and its isolation of documents."""

import pytest
import torch
from torch import Tensor

from megatron_vl.kernels import slabs
from megatron_vl.kernels.decode import selective_state_update
from megatron_vl.kernels.scan import ChunkScan
from megatron_vl.kernels.slabs import plan_chunks, useful_chunk
from megatron_vl.kernels.ssd import mamba_chunk_scan_combined
from tests.kernels.recurrence import Case, draw, relative, scan

BOUND = 1e-5


def chunked(
    case: Case,
    chunk_size: int,
    packed: bool = True,
    start: bool = True,
    limit: float = float("inf"),
) -> tuple[Tensor, Tensor]:
    result = mamba_chunk_scan_combined(
        case.x,
        case.dt,
        -torch.exp(case.A_log),
        case.B,
        case.C,
        chunk_size,
        D=case.D,
        z=case.z,
        dt_bias=case.dt_bias,
        initial_states=case.start if start else None,
        seq_idx=case.seq_idx if packed else None,
        dt_softplus=True,
        dt_limit=(0.0, limit),
        return_final_states=True,
    )
    assert isinstance(result, tuple)
    return result


SHAPES = [
    # batch, length, heads, head_dim, groups, state_dim, documents, chunk
    (1, 64, 4, 8, 1, 8, 1, 16),
    (2, 75, 8, 12, 2, 16, 5, 16),
    (1, 150, 8, 32, 2, 32, 6, 64),
    (1, 9, 4, 8, 4, 8, 3, 64),
    (1, 165, 4, 64, 2, 64, 4, 64),
    (1, 140, 4, 96, 2, 128, 3, 128),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_match_the_recurrence(shape: tuple[int, ...]) -> None:
    *sizes, documents, chunk = shape
    drawn = draw(*sizes, documents=documents, seed=sum(shape), per_channel_skip=documents == 5)
    ours, exact = drawn.to(torch.float32), drawn.to(torch.float64)
    results, references = chunked(ours, chunk), scan(exact)
    weights = [torch.randn_like(r) for r in references]
    for result, reference in zip(results, references, strict=True):
        assert relative(result, reference) <= BOUND
    loss = sum((r * w.float()).sum() for r, w in zip(results, weights, strict=True))
    exact_loss = sum((r * w).sum() for r, w in zip(references, weights, strict=True))
    grads = torch.autograd.grad(loss, ours.leaves())
    exact_grads = torch.autograd.grad(exact_loss, exact.leaves())
    errors = {n: relative(g, e) for n, g, e in zip(Case.NAMES, grads, exact_grads, strict=True)}
    assert max(errors.values()) <= BOUND, errors


@pytest.mark.parametrize("chunk", [16, 64, 128])
@pytest.mark.parametrize("budget", [1, 1 << 18])
def test_every_chunk_length_and_slab_plan_gives_the_same(
    chunk: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = draw(1, 200, 8, 8, 4, 16, documents=4)
    monkeypatch.setitem(slabs._SLAB_ELEMENTS, "cpu", budget)
    step = torch.nn.functional.softplus(case.dt + case.dt_bias)
    log = step * -torch.exp(case.A_log)
    y, final = ChunkScan.apply(
        case.x, step, log, case.B, case.C, case.D[:, None], case.start, case.seq_idx, chunk
    )
    reference, state = scan(case.to(torch.float64))
    assert relative(y * torch.nn.functional.silu(case.z), reference) <= BOUND
    assert relative(final, state) <= BOUND


def test_float64_is_exact_to_float64() -> None:
    case = draw(1, 90, 4, 8, 2, 8, documents=3).to(torch.float64)
    y, final = chunked(case, 32)
    reference, state = scan(case)
    assert relative(y, reference) < 1e-12
    assert relative(final, state) < 1e-12


def test_decays_beyond_the_range_of_exp_stay_finite_and_right() -> None:
    case = draw(1, 130, 4, 8, 2, 8, documents=3)
    case.A_log = torch.tensor([-3.0, 0.0, 3.0, 6.0])
    case.dt_bias = torch.full((4,), 2.0)
    ours, exact = case.to(torch.float32), case.to(torch.float64)
    y, reference = chunked(ours, 64)[0], scan(exact)[0]
    weight = torch.randn_like(y)
    grads = torch.autograd.grad((y * weight).sum(), ours.leaves())
    exact_grads = torch.autograd.grad((reference * weight).sum(), exact.leaves())
    assert relative(y, reference) <= BOUND
    for name, grad, other in zip(Case.NAMES, grads, exact_grads, strict=True):
        assert relative(grad, other) <= BOUND, name


def test_packed_equals_separate_documents() -> None:
    case = draw(1, 170, 8, 16, 2, 16, documents=5).to(torch.float32)
    packed, final = chunked(case, 64, start=False)
    ids = case.seq_idx[0].tolist()
    starts = [t for t in range(170) if t == 0 or ids[t] != ids[t - 1]]
    parts = [
        chunked(case.cut(0, a, b), 64, packed=False, start=False)
        for a, b in zip(starts, [*starts[1:], 170], strict=True)
    ]
    separate = torch.cat([y for y, _ in parts], 1)
    assert relative(packed, separate) < 1e-6
    assert relative(final, parts[-1][1]) < 1e-6
    weight = torch.randn_like(packed)
    leaves = case.leaves()[:-1]
    together = torch.autograd.grad((packed * weight).sum(), leaves)
    apart = torch.autograd.grad((separate * weight).sum(), leaves)
    for name, one, other in zip(Case.NAMES[:-1], together, apart, strict=True):
        assert relative(one, other) < BOUND, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_document_leaves_its_neighbours_bitwise_equal(dtype: torch.dtype) -> None:
    # Documents of 20, 30 and 50 tokens in chunks of 64: two starts inside the first chunk.
    first = draw(1, 100, 8, 16, 2, 16)
    first.seq_idx[:, 20:] += 1
    first.seq_idx[:, 50:] += 1
    other = draw(1, 100, 8, 16, 2, 16, seed=1)
    inside = torch.zeros(100, dtype=torch.bool)
    inside[20:50] = True
    changed = draw(1, 100, 8, 16, 2, 16)
    changed.seq_idx = first.seq_idx
    for name in ("x", "dt", "B", "C", "z"):
        getattr(changed, name)[:, inside] = 3 * getattr(other, name)[:, inside]
    weight = torch.randn(1, 100, 8, 16)
    outputs, grads = [], []
    for case in (first.to(dtype), changed.to(dtype)):
        y, _ = chunked(case, 64)
        outputs.append(y)
        timed = [getattr(case, n) for n in ("x", "dt", "B", "C", "z")]
        grads.append(torch.autograd.grad((y * weight.to(dtype)).sum(), timed))
    assert torch.equal(outputs[0][:, ~inside], outputs[1][:, ~inside])
    assert not torch.equal(outputs[0][:, inside], outputs[1][:, inside])
    for one, two in zip(*grads, strict=True):
        assert torch.equal(one[:, ~inside], two[:, ~inside])


def test_bfloat16_stays_within_its_own_rounding() -> None:
    case = draw(1, 160, 8, 16, 2, 16, documents=3)
    rounded = case.to(torch.bfloat16)
    y, final = chunked(rounded, 64)
    reference, state = scan(rounded.to(torch.float64))
    assert y.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    assert relative(y, reference) < 2**-7
    assert relative(final, state) < 2**-7


def test_the_same_inputs_give_the_same_gradients_bitwise() -> None:
    case = draw(1, 300, 8, 16, 2, 16, documents=3).to(torch.float32)
    runs = [torch.autograd.grad(chunked(case, 64)[0].sum(), case.leaves()) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("trained", [("x",), ("B", "C"), ("dt_bias",), ("D",), ("start", "z")])
def test_frozen_inputs_get_no_gradient_and_change_no_other(trained: tuple[str, ...]) -> None:
    case = draw(1, 50, 4, 8, 2, 8, documents=2).to(torch.float32)
    wanted = [getattr(case, name) for name in trained]
    expected = torch.autograd.grad(chunked(case, 16)[0].sum(), wanted)
    for name in set(Case.NAMES) - set(trained):
        getattr(case, name).requires_grad_(False)
    chunked(case, 16)[0].sum().backward()
    for name, gradient in zip(trained, expected, strict=True):
        assert torch.equal(getattr(case, name).grad, gradient)
    assert all(getattr(case, n).grad is None for n in set(Case.NAMES) - set(trained))


def test_inference_agrees_bitwise_with_training() -> None:
    case = draw(1, 300, 4, 8, 2, 8, documents=2).to(torch.float32)
    trained = chunked(case, 64)
    with torch.no_grad():
        inferred = chunked(case, 64)
    assert all(torch.equal(a, b) for a, b in zip(trained, inferred, strict=True))


def test_final_state_continues_the_sequence() -> None:
    case = draw(2, 90, 4, 8, 2, 8).to(torch.float32)
    whole, last = chunked(case, 16, packed=False)
    head, tail = draw(2, 90, 4, 8, 2, 8), draw(2, 90, 4, 8, 2, 8)
    for name in ("x", "dt", "B", "C", "z"):
        setattr(head, name, getattr(case, name)[:, :37])
        setattr(tail, name, getattr(case, name)[:, 37:])
    for part in (head, tail):
        part.A_log, part.D, part.dt_bias = case.A_log, case.D, case.dt_bias
    head.start = case.start
    first, tail.start = chunked(head, 16, packed=False)
    second, final = chunked(tail, 16, packed=False)
    assert relative(torch.cat([first, second], 1), whole) < 1e-6
    assert relative(final, last) < 1e-6


def test_dt_limits_are_applied_with_their_gradient() -> None:
    case = draw(1, 40, 4, 8, 2, 8)
    ours, exact = case.to(torch.float32), case.to(torch.float64)
    y, reference = chunked(ours, 16, limit=0.1)[0], scan(exact, high=0.1)[0]
    assert relative(y, reference) <= BOUND
    (grad,) = torch.autograd.grad(y.sum(), ours.dt)
    (exact_grad,) = torch.autograd.grad(reference.sum(), exact.dt)
    assert (exact_grad == 0).any()
    assert relative(grad, exact_grad) <= BOUND


@pytest.mark.parametrize("indexed", [False, True])
def test_one_token_at_a_time_equals_the_scan(indexed: bool) -> None:
    case = draw(2, 20, 4, 8, 2, 16).to(torch.float32)
    with torch.no_grad():
        y, final = chunked(case, 16, packed=False)
        rows = torch.tensor([3, 1], dtype=torch.int32) if indexed else None
        state = torch.zeros(5 if indexed else 2, 4, 8, 16)
        state[[3, 1] if indexed else [0, 1]] = case.start
        for t in range(20):
            out = selective_state_update(
                state,
                case.x[:, t],
                case.dt[:, t, :, None].expand(-1, -1, 8),
                -torch.exp(case.A_log)[:, None, None].expand(-1, 8, 16),
                case.B[:, t],
                case.C[:, t],
                case.D[:, None].expand(-1, 8),
                z=case.z[:, t],
                dt_bias=case.dt_bias[:, None].expand(-1, 8),
                dt_softplus=True,
                state_batch_indices=rows,
            )
            assert relative(out, y[:, t]) < 1e-5
        assert relative(state[[3, 1] if indexed else [0, 1]], final) < 1e-5


def test_a_step_does_not_depend_on_how_the_decay_is_stored() -> None:
    """One number a head, repeated without a copy or with one; a state in another type, too."""
    generator = torch.Generator().manual_seed(12)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, shared, skip = random(2, 6, 8), random(2, 2, 3, 16), random(6, 8)
    step, bias, rate = random(2, 6), random(6), -random(6).exp()
    repeated = (
        step[..., None].expand(2, 6, 8),
        rate[:, None, None].expand(6, 8, 16),
        bias[:, None].expand(6, 8),
    )
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
        before = random(2, 6, 8, 16).to(dtype)
        results = []
        for dt, A, dt_bias in (repeated, tuple(t.contiguous() for t in repeated)):
            state = before.clone()
            out = selective_state_update(
                state, x, dt, A, shared[:, :, 0], shared[:, :, 1], skip, None, dt_bias, True
            )
            results.append((out, state))
        (out, state), (others, theirs) = results
        assert relative(out, others) < 1e-6
        assert relative(state, theirs) < bound
        assert relative(state, before) > 0.1


def test_chunks_cover_the_sequence_once() -> None:
    for length in (1, 15, 16, 17, 100):
        covered = [
            t
            for c in plan_chunks(length, 16, 3)
            for t in range(c.start, c.start + c.count * c.width)
        ]
        assert covered == list(range(length))
        assert [c.index for c in plan_chunks(length, 16, 1)] == list(range(-(-length // 16)))


def test_chunks_are_halved_for_small_states_only() -> None:
    assert useful_chunk(64, 32, 32) == 32
    assert useful_chunk(128, 80, 128) == 128
    assert useful_chunk(16, 4, 4) == 16
    assert useful_chunk(100, 4, 4) == 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"D": torch.ones(3)}, "D has shape"),
        ({"B": torch.ones(1, 10, 3, 8)}, "divide into 3 groups"),
        ({"seq_idx": torch.zeros(1, 9, dtype=torch.int32)}, "seq_idx has shape"),
        ({"dt_limit": (-1.0, 1.0)}, "negative"),
        ({"return_varlen_states": True}, "document ends"),
        ({"chunk_size": 0}, "chunk size"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    case = draw(1, 10, 4, 8, 2, 8)
    arguments: dict[str, object] = {
        "x": case.x,
        "dt": case.dt,
        "A": -torch.ones(4),
        "B": case.B,
        "C": case.C,
        "chunk_size": 8,
    }
    with pytest.raises(ValueError, match=message):
        mamba_chunk_scan_combined(**(arguments | change))  # type: ignore[arg-type]
