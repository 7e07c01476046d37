"""Benchmarks of this repository: python benchmarks/run.py gram_volume --threads 1,all --out benchmarks/results/gram_volume.json"""

from pathlib import Path

from modalign.bench.command import make_app

if __name__ == "__main__":
    make_app(Path(__file__).parent)()
