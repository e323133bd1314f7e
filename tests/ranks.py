"""Start a script as several processes that talk to each other, as `torchrun` does on a machine with several GPUs."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def torchrun(script, *arguments, ranks=2, timeout=300):
    """Run tests/`script` or a module's arguments (`-m`, name, ...) on CPU ranks; returns the finished process."""
    script = HERE / script if script.endswith(".py") else script
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(script), *map(str, arguments)]
    path = os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    return subprocess.run(command, env=environment, timeout=timeout, capture_output=True, text=True, check=False)
