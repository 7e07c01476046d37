"""Modules over the ops: losses that keep their own temperature."""

from .contrastive_losses import ClipLoss, GramContrastiveLoss, SigLipLoss, TriangleContrastiveLoss

__all__ = ["ClipLoss", "GramContrastiveLoss", "SigLipLoss", "TriangleContrastiveLoss"]
