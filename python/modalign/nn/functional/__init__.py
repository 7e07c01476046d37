"""Losses of the papers as functions: plain compositions of torch and the streaming ops, one file per loss."""

from .attention_refocusing_loss import attention_refocusing_loss
from .binding_loss import binding_loss
from .cgvlm_loss import cgvlm_loss
from .clim_loss import clim_loss
from .clim_mosaic import Mosaics, clim_mosaic
from .entity_alignment_loss import entity_alignment_loss
from .flops_penalty import flops_penalty
from .hard_negative_infonce import hard_negative_infonce
from .id_loss import id_loss
from .jma_loss import jma_loss
from .keep_largest import keep_largest
from .log_sinkhorn import log_sinkhorn
from .mask_tokens import mask_tokens
from .mgca_token_loss import mgca_token_loss
from .noise_robust_pair_loss import noise_robust_pair_loss
from .notellm2_objective import notellm2_objective
from .overuse_penalty import overuse_penalty
from .pmrl_loss import pmrl_loss
from .pool_cells import pool_cells
from .prototype_alignment_loss import prototype_alignment_loss
from .sdm_loss import sdm_loss
from .superaligned_loss import superaligned_loss
from .select_by_attention_ratio import attention_ratio, select_by_attention_ratio
from .symile_loss import symile_loss, symile_similarity
from .tcl_loss import cross_modal_alignment, local_mutual_information, pool_patches, tcl_loss
from .token_energy import energy_order, token_energy
from .vidla_contrastive import vidla_contrastive
from .villa_mapping_loss import villa_mapping_loss
from .villa_regions import RegionAttributes, villa_regions

__all__ = [
    "Mosaics",
    "RegionAttributes",
    "attention_ratio",
    "attention_refocusing_loss",
    "binding_loss",
    "cgvlm_loss",
    "clim_loss",
    "clim_mosaic",
    "cross_modal_alignment",
    "energy_order",
    "entity_alignment_loss",
    "flops_penalty",
    "hard_negative_infonce",
    "id_loss",
    "jma_loss",
    "keep_largest",
    "local_mutual_information",
    "log_sinkhorn",
    "mask_tokens",
    "mgca_token_loss",
    "noise_robust_pair_loss",
    "notellm2_objective",
    "overuse_penalty",
    "pmrl_loss",
    "pool_cells",
    "pool_patches",
    "prototype_alignment_loss",
    "sdm_loss",
    "select_by_attention_ratio",
    "superaligned_loss",
    "symile_loss",
    "symile_similarity",
    "tcl_loss",
    "token_energy",
    "vidla_contrastive",
    "villa_mapping_loss",
    "villa_regions",
]
