"""Makes the peers' virtual environments, each with what it needs and nothing else.

    python benchmarks/peers/environments.py DIR [NAME ...]

An environment that is there already is left as it is. Figures are told with the versions that are in it.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ENVIRONMENTS: dict[str, list[list[str]]] = {
    "transformers": [["transformers==5.24.0", "torch==2.13.0"]],
    # The last with Flax models; newer JAX lacks what it imports.
    "flax": [["transformers==4.55.4", "jax==0.6.2", "jaxlib==0.6.2", "flax==0.10.7", "optax==0.2.5"]],
    # Without its dependencies but what importing it takes: TensorFlow Text serves preprocessing, which is not measured.
    "keras": [
        ["keras==3.14.1", "jax==0.10.2", "regex", "kagglehub", "tensorflow-cpu", "tokenizers", "sentencepiece"],
        ["--no-deps", "keras-hub==0.29.1"],
    ],
}


def main() -> None:
    directory, *names = sys.argv[1:]
    for name in names or ENVIRONMENTS:
        path = Path(directory) / name
        if path.exists():
            print(f"{path}: is there")
            continue
        partial = path.with_name(f"{name}.partial")
        venv.create(partial, clear=True, with_pip=True)
        for requirements in ENVIRONMENTS[name]:
            pip = [str(partial / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, *requirements], check=True)
        partial.rename(path)
        print(f"{path}: made")


if __name__ == "__main__":
    main()
