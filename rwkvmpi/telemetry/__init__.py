"""What every rank says of itself once a second, for `rwkvmpi watch` and `rwkvmpi status`; see `sampler`.

Samples go over the network to whoever watches (`network`) and now and then into files of the run folder (`files`);
`client` reads both. Nothing here may harm the run: what fails ends quietly, with one line in the rank's log file.
"""

from rwkvmpi.telemetry.sampler import Telemetry, begin

__all__ = ["Telemetry", "begin"]
