"""Every case of a file here, by `modalign bench run`:

    python benchmarks/run.py gram_volume --quick
"""

import sys
from pathlib import Path

from modalign.bench.command import app
from modalign.bench.files import case_files

if __name__ == "__main__":
    files = {path.parent.name if path.stem == "cases" else path.stem: path for path in case_files(Path(__file__).parent)}
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in files:
        sys.exit(f"benchmarks/run.py: the first argument must be one of {sorted(files)}, got {name!r}; options: modalign bench run --help")
    app(["run", str(files[name]), *sys.argv[2:]], prog_name="modalign bench")
