"""This version trains in one process: several ranks all say so, instead of racing for one run directory."""

from __future__ import annotations

import os

from fewbits.errors import FewbitsError


def refuse_ranks() -> None:
    """Raises FewbitsError when a launcher (torchrun, mpirun, srun with PMI) has started more than one process."""
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        ranks = os.environ.get(name, "")
        if ranks.isdecimal() and int(ranks) > 1:
            raise FewbitsError(
                f"Started on {ranks} ranks ({name}={ranks}), and this version of fewbits trains on one device. "
                "Start it as one process, without torchrun or mpirun."
            )
