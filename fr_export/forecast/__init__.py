"""What an export will take: bytes on the disk, memory, time. `--dry-run` shows it, and an export refuses by it.

work.py       how much there is to do: values, layers, tokens
stages.py     stage → its seconds and its peak memory, from rates that were measured
machine.py    how fast this machine is beside the one where they were measured
forecast.py   all of it for one export
table.py      the forecast on a terminal
"""
