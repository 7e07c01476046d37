"""What the figures share: size, colours, and a way to save that gives the same small SVG each time."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

BLUE, ORANGE, GREEN, GREY, RED, PURPLE = "#1f5fa8", "#d9730d", "#2e8b57", "#7a7a7a", "#b3261e", "#7b4fa3"

plt.rcParams.update({
    "figure.figsize": (6.4, 3.4),
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",      # text stays text: small files, readable by search
    "svg.hashsalt": "modalign",  # the same identifiers each time
})


def save(figure, script: str) -> None:
    """Beside the script, under its name."""
    path = Path(script).with_suffix(".svg")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    # matplotlib leaves spaces at line ends, which reviews mark as mistakes
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    print(f"{path}: {path.stat().st_size / 1024:.1f} KB")
