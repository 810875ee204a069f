"""Many runs of run_sjc.py from one table, by submitit: on the GPUs or cores of one machine, or as an array of Slurm.

plan.py        the table: a YAML file as runs, each with a name, a checked configuration and its flags
folder.py      what the folder of a run says of it: finished, stopped or failed, steps, time
job.py         what a machine does for one run
executors.py   where runs are started: this machine, or Slurm
work.py        all runs until the last has ended, or Ctrl-C
report.py      the table and the page of results
"""
