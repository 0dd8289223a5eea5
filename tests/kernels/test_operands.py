"""The checks of the operands refuse everything that the kernels would misread."""

import pytest
import torch

from megalard.kernels.relation_kl import full_mask, relation_kl
from megalard.kernels.relation_kl.operands import check_operands


def test_operands_that_do_not_fit_are_refused():
    x = torch.randn(1, 4, 6, 8)
    mask = full_mask(1, 6, 6)

    def refused(match, *operands, **options):
        with pytest.raises(ValueError, match=match):
            relation_kl(*operands, **{"mask": mask, **options})

    refused("multiple", x, x, x[:, :3], x[:, :3])
    refused("differ in head_dim", x, x, x[..., :4], x)
    refused("both be given", x, x, x)
    refused("above 256", torch.randn(1, 1, 6, 257), x[:, :1])
    refused("teacher rows differ", x, x[:, :2])
    refused("the mask is for", x, x, mask=full_mask(1, 6, 5))
    refused("student rows are", x, x, x.half(), x)
    refused("floating point", x.long(), x)
    refused("is on meta", x, x.to("meta"))
    refused("positive", x, x, scale_s=-1.0)


def test_only_operands_with_a_strided_last_dimension_are_copied():
    x = torch.randn(1, 4, 6, 8)
    strided = x.mT.contiguous().mT
    op = check_operands(strided, x, None, None, full_mask(1, 6, 6), None, None)
    copied = op.with_unit_strides()
    assert copied.rows_s.stride(3) == copied.cols_s.stride(3) == 1
    assert torch.equal(copied.rows_s, strided) and copied.rows_t is x
    transposed = torch.randn(1, 6, 4, 8).transpose(1, 2)
    op = check_operands(transposed, transposed, None, None, full_mask(1, 6, 6), None, None)
    assert op.with_unit_strides() is op


def test_scales_default_to_the_inverse_root_of_each_head_dim():
    student, teacher = torch.randn(1, 2, 6, 16), torch.randn(1, 2, 6, 64)
    op = check_operands(student, teacher, None, None, full_mask(1, 6, 6), None, None)
    assert (op.scale_s, op.scale_t) == (0.25, 0.125)
    op = check_operands(student, teacher, None, None, full_mask(1, 6, 6), 2, 3)
    assert (op.scale_s, op.scale_t) == (2.0, 3.0)
