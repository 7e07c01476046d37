"""The examples of contrastive losses run and say what they claim; they assert it themselves."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SAYS = {
    "swap_a_clip_loss": "peak memory of a step at batch 5000",
    "one_modality_missing": "with NaN in the gaps: the same loss and the same weights",
    "loss_over_two_processes": "process_group, ring",
    "text_weighted_views": "| the mean weighted by the text |",
    "hard_negatives_in_languages": "| 3 mined negatives, limited |",
    "two_hundred_pairs": "| chosen layers, STRUCTURE 0.2 |",
    "zero_shot_categories": "| made up, 8 | 100 |",
    "incomplete_views": "| made up, 6 classes | 50% |",
    "entities_in_two_languages": "| 50% |",
    "matching_modalities": "| sketch |",
    "large_batch_in_chunks": "512 samples in chunks of 32: the gradients of the parameters agree",
}


@pytest.mark.parametrize("name", list(SAYS))
def test_the_example_runs(name, tmp_path):
    finished = subprocess.run([sys.executable, ROOT / "examples" / f"{name}.py"], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert SAYS[name] in finished.stdout
