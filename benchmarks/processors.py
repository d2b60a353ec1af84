"""Which settings give the same bytes on which processors, and what they cost: the table of docs/reproducibility.md.

    python -m benchmarks.processors

Training steps under processors that QEMU emulates (Debian's package qemu-user), and their CPU time on this one.
"""

import os
import shutil
import subprocess
import sys
from statistics import median

from mnist_vae.portable import SETTINGS
from tools.machine import processor
from tools.table import table

PROCESSORS = ("EPYC", "Haswell", "Skylake-Client")
AVX2 = {name: value for name, value in SETTINGS.items() if name != "MKL_CBWR"}
ROWS = {  # what is set, and whether torch's own matrix products are used
    "nothing": ({}, True),
    "AVX2": (AVX2, True),
    "AVX2, `MKL_CBWR=AVX2`": (AVX2 | {"MKL_CBWR": "AVX2"}, True),
    "AVX2, `MKL_CBWR=COMPATIBLE`": (SETTINGS, True),
    "AVX2, products by OpenBLAS": (AVX2, False),
    "AVX2, products by OpenBLAS, `MKL_CBWR=COMPATIBLE` (the default)": (SETTINGS, False),
}
STEPS, TIMED_STEPS, ROUNDS = 4, 300, 5

WORKER = """
import hashlib, sys, time
import torch
from mnist_vae.model import products
from mnist_vae.model.cpu import set_up_cpu
from mnist_vae.model.vae import VAE, VAEConfig, negative_elbo

steps, is_torchs_own = int(sys.argv[1]), sys.argv[2] == "True"
if is_torchs_own:
    products.Linear.forward = torch.nn.Linear.forward
set_up_cpu(1)
torch.manual_seed(1)
vae, x = VAE(VAEConfig()), torch.rand(64, 784)
optimizer = torch.optim.Adam(vae.parameters(), fused=True)
start = 0.0
for step in range(steps):
    if step == steps // 10:  # what is made once, is made
        start = time.process_time()
    posterior = vae.encode(x)
    loss = negative_elbo(vae.decode(posterior.sample()), x, posterior).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
seconds = time.process_time() - start
weights = b"".join(weight.detach().numpy().tobytes() for weight in vae.parameters())
print(hashlib.sha256(weights).hexdigest(), seconds)
"""


def main() -> None:
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        sys.exit("needs qemu-x86_64, which Debian's package qemu-user has")
    here = {name: train(name, STEPS)[0] for name in ROWS}
    there = {name: [train(name, STEPS, [qemu, "-cpu", one])[0] for one in PROCESSORS] for name in ROWS}
    seconds: dict[str, list[float]] = {name: [] for name in ROWS}
    for _ in range(ROUNDS):
        for name, found in seconds.items():
            found.append(train(name, TIMED_STEPS)[1])
    rows = []
    for name in ROWS:
        equal = ["equal" if digest == here[name] else "differs" for digest in there[name]]
        rows.append([name, *equal, f"{median(seconds[name]) / median(seconds['nothing']):.2f} ×"])
    print(f"Bytes on {processor()}, beside those under")
    print(table(["settings", *PROCESSORS, "CPU time here"], rows))


def train(name: str, steps: int, emulator: list[str] | None = None) -> tuple[str, float]:
    """The digest of the weights after so many steps, and the seconds of CPU time that these took."""
    settings, is_torchs_own = ROWS[name]
    env = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    command = [*(emulator or []), sys.executable, "-c", WORKER, str(steps), str(is_torchs_own)]
    done = subprocess.run(
        command,
        env=env | settings | {"PYTHONPATH": "src"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    digest, seconds = done.stdout.split()
    return digest, float(seconds)


if __name__ == "__main__":
    main()
