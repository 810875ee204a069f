"""The final video of a field: its frames, and the files that they become.

frames   the frames along a path, rendered and decoded; backgrounds and transparency
files    the folder of pictures and videos, which appears whole
"""
