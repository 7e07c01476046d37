"""Losses of the papers as functions: plain compositions of torch and the streaming ops, one file per loss."""

from .binding_loss import binding_loss
from .cgvlm_loss import cgvlm_loss
from .hard_negative_infonce import hard_negative_infonce
from .id_loss import id_loss
from .mask_tokens import mask_tokens
from .notellm2_objective import notellm2_objective
from .pmrl_loss import pmrl_loss
from .sdm_loss import sdm_loss
from .superaligned_loss import superaligned_loss
from .symile_loss import symile_loss, symile_similarity
from .tcl_loss import cross_modal_alignment, local_mutual_information, pool_patches, tcl_loss
from .vidla_contrastive import vidla_contrastive

__all__ = [
    "binding_loss",
    "cgvlm_loss",
    "cross_modal_alignment",
    "hard_negative_infonce",
    "id_loss",
    "local_mutual_information",
    "mask_tokens",
    "notellm2_objective",
    "pmrl_loss",
    "pool_patches",
    "sdm_loss",
    "superaligned_loss",
    "symile_loss",
    "symile_similarity",
    "tcl_loss",
    "vidla_contrastive",
]
