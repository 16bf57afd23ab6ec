"""Losses against sums written out in float64, and their gradients against finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F

from jv5kernels.training import losses

GRADCHECK = {"eps": 1e-6, "atol": 1e-7, "rtol": 1e-5}


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def unit(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


def test_cosine_distillation():
    student, teacher = random(5, 7), random(5, 7, seed=1)
    expected = sum(1 - float(unit(s) @ unit(t)) for s, t in zip(student, teacher, strict=True)) / 5
    assert losses.cosine_distillation(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert losses.cosine_distillation(student, 3 * student).item() == pytest.approx(0, abs=1e-12)
    assert losses.cosine_distillation(student, -student).item() == pytest.approx(2)


@pytest.mark.parametrize("negatives", [0, 1, 4])
def test_info_nce(negatives):
    queries, documents, tau = random(3, 5), random(3 + negatives, 5, seed=1), 0.3
    expected = 0.0
    for i in range(3):
        terms = [math.exp(float(unit(queries[i]) @ unit(d)) / tau) for d in documents]
        expected -= math.log(terms[i] / sum(terms)) / 3
    assert losses.info_nce(queries, documents, tau).item() == pytest.approx(expected, rel=1e-12)


def test_info_nce_leaves_false_negatives_out_and_keeps_the_positive():
    queries, documents = random(3, 5), random(5, 5, seed=1)
    masked = torch.zeros(3, 5, dtype=torch.bool)
    masked[0, [0, 1]] = True
    expected = losses.info_nce(queries[:1], documents[[0, 2, 3, 4]], 0.3)
    others = losses.info_nce(queries, documents, 0.3, masked)
    rest = [
        F.cross_entropy(unit(queries[i : i + 1]) @ unit(documents).T / 0.3, torch.tensor([i]))
        for i in (1, 2)
    ]
    assert others.item() == pytest.approx((expected + sum(rest)).item() / 3, rel=1e-12)


def test_info_nce_wants_a_positive_for_every_query():
    with pytest.raises(ValueError, match="documents has 2 rows, fewer than the 3 queries"):
        losses.info_nce(random(3, 4), random(2, 4), 0.1)


def test_bidirectional_info_nce():
    a, p = random(4, 6), random(4, 6, seed=1)
    masked = torch.zeros(4, 4, dtype=torch.bool)
    masked[0, 2] = True
    expected = (losses.info_nce(a, p, 0.2, masked) + losses.info_nce(p, a, 0.2, masked.T)) / 2
    got = losses.bidirectional_info_nce(a, p, 0.2, masked)
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    assert got.item() != pytest.approx(losses.info_nce(a, p, 0.2, masked).item())


def test_orthogonal_regularizer():
    queries, documents = random(4, 6), random(4, 6, seed=1)
    expected = 0.0
    for x in (queries, documents):
        x = unit(x)
        expected += sum(float(x[i] @ x[j]) ** 2 for i in range(4) for j in range(4) if i != j) / 12
    got = losses.orthogonal_regularizer(queries, documents)
    assert got.item() == pytest.approx(expected, rel=1e-12)
    orthogonal = torch.eye(4, dtype=torch.float64)
    assert losses.orthogonal_regularizer(orthogonal, 2 * orthogonal).item() == 0
    with pytest.raises(ValueError, match="1 is too few"):
        losses.orthogonal_regularizer(queries[:1], documents[:1])


def test_cosent():
    cosines, scores, tau = random(6).tanh(), torch.tensor([3.0, 1, 2, 2, 0, 3]).double(), 0.05
    total = 1.0
    for i in range(6):
        for j in range(6):
            if scores[i] > scores[j]:
                total += math.exp(float(cosines[j] - cosines[i]) / tau)
    assert losses.cosent(cosines, scores, tau).item() == pytest.approx(math.log(total), rel=1e-12)
    assert losses.cosent(cosines, torch.ones(6).double(), tau).item() == 0


def test_relational_distillation_ignores_scale_and_dimension():
    student, teacher = random(5, 3), random(5, 8, seed=1)
    s, t = unit(student), unit(teacher)
    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    ds = torch.stack([(s[i] - s[j]).norm() for i, j in pairs])
    dt = torch.stack([(t[i] - t[j]).norm() for i, j in pairs])
    expected = (ds / ds.mean() - dt / dt.mean()).square().mean()
    got = losses.relational_distillation(student, teacher)
    assert got.item() == pytest.approx(expected.item(), rel=1e-10)
    widened = F.pad(3 * student, (0, 4))
    assert losses.relational_distillation(student, widened).item() == pytest.approx(0, abs=1e-20)


def test_matryoshka_is_the_mean_over_prefixes():
    x, y = random(4, 8), random(4, 8, seed=1)
    parts = [losses.cosine_distillation(x[:, :d], y[:, :d]) for d in (2, 4, 8)]
    got = losses.matryoshka(losses.cosine_distillation, (x, y), (2, 4, 8))
    assert got.item() == pytest.approx((sum(parts) / 3).item(), rel=1e-12)
    with pytest.raises(ValueError, match="within the 8 dimensions"):
        losses.matryoshka(losses.cosine_distillation, (x, y), (4, 16))


SCORES = torch.tensor([2.0, 0, 1, 1], dtype=torch.float64)
CASES = {
    "cosine_distillation": lambda a, b, t: losses.cosine_distillation(a, b),
    "info_nce": lambda a, b, t: losses.info_nce(a[:3], b, t.exp()),
    "bidirectional_info_nce": lambda a, b, t: losses.bidirectional_info_nce(a, b, t.exp()),
    "orthogonal_regularizer": lambda a, b, t: losses.orthogonal_regularizer(a, b),
    "cosent": lambda a, b, t: losses.cosent(F.cosine_similarity(a, b), SCORES, t.exp()),
    "relational_distillation": lambda a, b, t: losses.relational_distillation(
        a, random(4, 9, seed=2)
    ),
    "matryoshka": lambda a, b, t: losses.matryoshka(
        lambda q, d: losses.info_nce(q, d, t.exp()), (a, b), (2, 5)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    a, b = random(4, 5).requires_grad_(), random(4, 5, seed=1).requires_grad_()
    temperature = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(CASES[name], (a, b, temperature), **GRADCHECK)
