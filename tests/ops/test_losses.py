"""Losses: hand-computed values, zeros where student and teacher agree, duplicates as no negatives."""

import math

import pytest
import torch
from torch import Tensor

from mmcompress.ops import losses


def vectors(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.199977), (2.0, 0.273916), (4.0, 0.277908)])
def test_softened_kl_golden(temperature: float, expected: float) -> None:
    teacher = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64)
    student = torch.tensor([[1.0, 0.5, -0.5]], dtype=torch.float64)
    assert losses.softened_kl(student, teacher, temperature).item() == pytest.approx(expected, abs=5e-7)


def test_feature_is_the_squared_distance_of_unit_vectors() -> None:
    # (3,4)/5 and (4,3)/5: cosine 24/25, so 2 (1 - 0.96) = 0.08; scaling either changes nothing
    assert losses.feature(torch.tensor([[3.0, 4.0]]), torch.tensor([[40.0, 30.0]])).item() == pytest.approx(
        0.08, abs=1e-6
    )
    assert losses.feature(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item() == pytest.approx(2.0)


def test_contrastive_golden() -> None:
    unit = torch.eye(2, dtype=torch.float64)
    # each row's logits are (1, 0): -log(e / (e + 1)) = log(1 + 1/e)
    assert losses.contrastive(unit, unit, 1.0).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert losses.contrastive(unit, unit, 3.0).item() == pytest.approx(math.log(1 + math.exp(-3)))


def test_relational_golden() -> None:
    unit, alike = torch.eye(2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    # the teacher's rows are softmax(1, 0) = (p, 1 - p), the student's are uniform: KL = log 2 - H(p)
    p = math.e / (math.e + 1)
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert losses.relational((alike, alike), (unit, unit), 1.0).item() == pytest.approx(math.log(2) - entropy)
    assert losses.affinity(alike, unit, unit, 1.0).item() == pytest.approx(math.log(2) - entropy)


def test_relational_reads_the_matrix_both_ways() -> None:
    # rows agree up to a constant per row, columns do not: only the column reading sees the difference
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    student = teacher + torch.tensor([[2.0], [0.0]], dtype=torch.float64)
    assert losses.softened_kl(student, teacher).item() == pytest.approx(0.0, abs=1e-12)
    assert losses.matrix_kl(student, teacher).item() > 0.05
    assert losses.matrix_kl(student.T, teacher.T).item() == pytest.approx(losses.matrix_kl(student, teacher).item())


def test_equal_models_have_zero_loss_and_zero_gradient() -> None:
    images, texts = vectors(6, 5, seed=1), vectors(6, 5, seed=2)
    own = [images.clone().requires_grad_(), texts.clone().requires_grad_()]
    pair = (own[0], own[1])
    for loss in (
        losses.feature(own[0], images) + losses.feature(own[1], texts),
        losses.relational(pair, (images, texts), 20.0),
        losses.structure(own[0], images, 20.0) + losses.structure(own[1], texts, 20.0),
        losses.affinity(own[0], images, texts, 20.0, 2.0) + losses.affinity(own[1], texts, images, 20.0, 2.0),
        losses.matrix_kl(losses.cosines(*pair), losses.cosines(images, texts), 3.0),
    ):
        assert loss.item() == pytest.approx(0.0, abs=1e-12)
        for gradient in torch.autograd.grad(loss, own):
            assert gradient.abs().max().item() < 1e-12


def test_divergences_are_positive_and_fall_along_the_gradient() -> None:
    images, texts = vectors(6, 5, seed=1), vectors(6, 5, seed=2)
    own = vectors(6, 5, seed=3).requires_grad_()
    for name, loss in {
        "feature": lambda x: losses.feature(x, images),
        "interactive": lambda x: losses.interactive((x, texts), (images, texts), 5.0),
        "relational": lambda x: losses.relational((x, texts), (images, texts), 5.0),
        "structure": lambda x: losses.structure(x, images, 5.0),
        "affinity": lambda x: losses.affinity(x, images, texts, 5.0),
    }.items():
        value = loss(own)
        (gradient,) = torch.autograd.grad(value, own)
        assert value.item() > 0, name
        assert loss(own - 1e-3 * gradient).item() < value.item(), name


def test_interactive_is_the_mean_of_four_contrastive_losses() -> None:
    a, b, c, d = (vectors(4, 3, seed=seed) for seed in range(4))
    expected = sum(losses.contrastive(q, k, 7.0) for q, k in ((a, d), (d, a), (c, b), (b, c))) / 4
    assert losses.interactive((a, b), (c, d), 7.0).item() == pytest.approx(float(expected))


def test_duplicates_are_marked_by_any_id_but_never_with_themselves() -> None:
    texts, samples = torch.tensor([0, 1, 0, 2]), torch.tensor([5, 6, 7, 6])
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[0, 2] = expected[2, 0] = expected[1, 3] = expected[3, 1] = True
    assert torch.equal(losses.duplicates(texts, samples), expected)


def test_a_duplicate_caption_is_not_a_negative() -> None:
    queries, keys = vectors(3, 4, seed=1), vectors(3, 4, seed=2)
    keys[2] = keys[0]
    same = losses.duplicates(torch.tensor([0, 1, 0]))
    # row 0 must read as if its double, key 2, were not there
    alone = 5.0 * losses.cosines(queries[:1], keys[:2])
    first = -torch.log_softmax(alone, dim=-1)[0, 0]
    last = -torch.log_softmax(5.0 * losses.cosines(queries[2:], keys[[1, 2]]), dim=-1)[0, 1]
    middle = -torch.log_softmax(5.0 * losses.cosines(queries[1:2], keys), dim=-1)[0, 1]
    assert losses.contrastive(queries, keys, 5.0, same).item() == pytest.approx(float(first + middle + last) / 3)
    assert losses.contrastive(queries, keys, 5.0).item() > losses.contrastive(queries, keys, 5.0, same).item()


def test_a_batch_of_one_has_no_negatives() -> None:
    one, other = vectors(1, 3, seed=1), vectors(1, 3, seed=2)
    assert losses.contrastive(one, other, 10.0).item() == 0.0
    assert losses.structure(one, other, 10.0).item() == 0.0


def test_a_row_does_not_see_itself_in_the_structure() -> None:
    # With two rows each sees only the other: a softmax over one entry, the same for every model.
    student, teacher = vectors(2, 3, seed=1), vectors(2, 3, seed=2)
    assert losses.structure(student, teacher, 10.0).item() == 0.0
    assert losses.structure(vectors(3, 3, seed=1), vectors(3, 3, seed=2), 10.0).item() > 0.01


def test_structure_and_relational_allow_different_widths() -> None:
    student, teacher = (vectors(4, 3, seed=1), vectors(4, 3, seed=2)), (vectors(4, 7, seed=3), vectors(4, 7, seed=4))
    assert losses.relational(student, teacher, 3.0).item() > 0
    assert losses.structure(student[0], teacher[0], 3.0).item() > 0


def roots(*rows: tuple[float, ...]) -> Tensor:
    """Next-token distributions as families encode them."""
    return torch.tensor(rows, dtype=torch.float64).sqrt()


def test_answer_kl_golden() -> None:
    # KL((1/2, 1/2) || (1/4, 3/4)) = log(2 / sqrt 3); KL((1, 0) || (1/2, 1/2)) = log 2, though 0 log 0 occurs.
    found = losses.answer_kl(roots((0.25, 0.75), (0.5, 0.5)), roots((0.5, 0.5), (1.0, 0.0)))
    assert found.tolist() == pytest.approx([math.log(2 / math.sqrt(3)), math.log(2)])
    # In the logarithms of the distributions it is the softened KL at temperature 1.
    student, teacher = (vectors(3, 7, seed=seed).log_softmax(-1) for seed in (1, 2))
    ours = losses.answer_kl((student / 2).exp(), (teacher / 2).exp()).mean()
    assert ours.item() == pytest.approx(losses.softened_kl(student, teacher).item())


def test_answer_kl_has_no_gradient_where_both_agree_and_a_finite_one_where_a_word_is_impossible() -> None:
    logits = vectors(4, 6, seed=1).requires_grad_()
    teacher = vectors(4, 6, seed=1).log_softmax(-1)
    losses.answer_kl((logits.log_softmax(-1) / 2).exp(), (teacher / 2).exp()).sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-12
    sure = torch.tensor([[0.0, -1e9]], dtype=torch.float64, requires_grad=True)
    losses.answer_kl((sure.log_softmax(-1) / 2).exp(), roots((0.5, 0.5))).sum().backward()
    assert sure.grad is not None
    assert sure.grad.isfinite().all()


def test_token_log_likelihoods_golden() -> None:
    found = losses.token_log_likelihoods(roots((0.25, 0.75), (0.5, 0.5)), torch.tensor([1, 0]))
    assert found.tolist() == pytest.approx([math.log(0.75), math.log(0.5)])


def test_hidden_is_one_for_a_constant_and_knows_no_scale() -> None:
    teacher = torch.tensor([[1.0, 3.0], [10.0, 30.0]], dtype=torch.float64)
    assert losses.hidden(teacher.mean(1, keepdim=True).expand(2, 2), teacher).item() == pytest.approx(1.0)
    # Off by 1 everywhere: 1 / variance 1, 1 / variance 100.
    assert losses.hidden(teacher + 1, teacher).item() == pytest.approx((1 + 0.01) / 2)
    assert losses.hidden(teacher, teacher).item() == 0
