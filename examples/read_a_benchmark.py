"""Read what `modalign bench run` wrote, and say what is what.

    python examples/read_a_benchmark.py                       the committed results of gram_volume
    python examples/read_a_benchmark.py my_results.json       yours

Every figure is a median over interleaved rounds with the quantiles between which 60 % of them lie. A row without "seconds" has no speed: its result
was wrong (mismatch), or its provider failed or could not run, and "reason" says why.
"""

import sys
from pathlib import Path

from modalign import bench

committed = Path(__file__).parent.parent / "benchmarks" / "results" / "gram_volume.json"
results = bench.read_results(sys.argv[1] if len(sys.argv) > 1 else committed)

facts = results["environment"]
where = facts["gpu"]["model"] if facts["gpu"] else f"{facts['cpu']['model']}, kernels on {facts['cpu']['instruction_set']}"
print(f"{where}; torch {facts['torch']}; seed {results['seed']}")
print(f"to repeat it: {results['command']}\n")

# Rows that can be compared with each other agree in everything but the provider.
groups: dict[tuple, list[dict]] = {}
for row in results["rows"]:
    groups.setdefault((row["case"], *row["parameters"].items(), row["dtype"], row["pass"], row["threads"]), []).append(row)

for rows in groups.values():
    first = rows[0]
    sizes = " ".join(f"{key}={value}" for key, value in first["parameters"].items())
    timed = [row for row in rows if "seconds" in row]
    print(f"{first['case']} {sizes} {first['dtype']} {first['pass']}, {first['threads']} threads")
    for row in sorted(timed, key=lambda row: row["seconds"]["median"]):
        parts = [f"{1e3 * row['seconds']['median']:9.3f} ms"]
        if row.get("flop_per_second"):
            parts.append(f"{row['flop_per_second'] / 1e9:7.1f} GFLOP/s")  # of the FLOP that the problem needs, whatever the provider does
        if row.get("ratio_to_floor") and row["kind"] != "floor":
            # The floor is the least that the problem costs: the same products by torch.mm, or the same bytes by a copy, in the same rounds
            # ("declared"), or computed from the machine's rates ("machine"). 1.0 is as fast as that.
            source = (row.get("floor") or {"source": "declared"})["source"]
            parts.append(f"{row['ratio_to_floor']['median']:6.2f} × the {source} floor")
        if row.get("target"):
            parts.append(f"target ≤ {row['target']['ratio']}: {'met' if row['target']['met'] else 'missed'}")
        if row.get("noisy"):
            parts.append("noisy: it or its floor spread by more than 10 %, so measure again before believing small differences")
        print(f"    {row['provider']:24s} {'  '.join(parts)}")
    for row in rows:
        if "seconds" not in row:
            print(f"    {row['provider']:24s} {row['status']}: {row['reason']}")

fastest = [
    min((row for row in rows if "seconds" in row and row["kind"] != "floor"), key=lambda row: row["seconds"]["median"], default=None)
    for rows in groups.values()
]
wins = [row for row in fastest if row]
print(f"\nours is the fastest in {sum(row['kind'] == 'ours' for row in wins)} of {len(wins)} groups")
