"""A pytest plugin: `from modalign import _host` finds the build with AddressSanitizer in the folder MODALIGN_HOST_BUILD, in every process of tests. See run_asan.sh."""

import importlib.util
import os
import sys
from pathlib import Path

(path,) = Path(os.environ["MODALIGN_HOST_BUILD"]).glob("_host*.so")
spec = importlib.util.spec_from_file_location("modalign._host", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.build_info()["address_sanitizer"], path
sys.modules["modalign._host"] = module
