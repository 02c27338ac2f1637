"""The seeded simulation of the microkernel: one seed decides the machine, everything that happens to it, and when.

    setup     what a seed decides before anything happens          choose    the next event, drawn from a seed and the state
    events    an event as data, and how it reads                   verbs     what each kind of event does, and what must follow
    ledger    what the outside knows and therefore expects         mirror    what plans must obey, seen from the executor
    world     kernel, gateways, executors, storage and wires       oracles   what must hold after every event
    run       a life from a seed or from a list of events          shrink    the shortest list that still fails

Invariant: a life is a function of (setup, list of events), so any part of a list can be left out and the rest still means something.
"""
