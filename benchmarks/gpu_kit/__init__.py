"""A folder that carries the GPU check to a machine without network: `make gpu-kit OUT=…`.

| file | does |
|---|---|
| kit | lays the folder out: sources, bundles, wheels, the script |
| wheels | the wheels for a Python and a machine, by pip |
| parts | one file cut into parts, for channels that take only small ones |
| run.sh | installs and runs the check there |
"""
