"""`llmosctl top`: a live view of sequences, tenants, pages and services.

    keys.py       bytes of a terminal -> keys
    rates.py      counters -> rates
    listing.py    rows: sorting, filtering, a selection that stays with its row
    columns.py    what the two tables show of a row
    state.py      all that the view knows: polled answers, what the user chose; pure, time is an argument
    control.py    a key -> a change of the state, or something to do
    look.py       characters and styles; text made harmless and exactly as wide as asked
    header.py, panels.py, view.py   state -> lines of a frame
    worker.py     calls of the client, off the thread that draws
    app.py        the loop and the command

Only `worker.py`, `app.py` and `Keyboard` touch the world.
"""
