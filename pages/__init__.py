"""Pages that people read: one file each, which needs no network. What all share is here, and the page of a run.

markup.py   HTML: escaping, the frame of a page and what it may do, pictures, numbers
facts.py    what the folder of a run says of it
shows.py    what the page of a run shows: its video, its mesh, its pictures
curves.py   its history as curves
run.py      the page of a run
live.py     the page of a run that goes on
style.css   how all pages look
page.js     a page that reloads itself while its run goes on
mesh.js     the 3D view
three/      the library of the 3D view
"""
