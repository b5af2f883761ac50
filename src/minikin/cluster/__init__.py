"""Many concepts, many prompts, many replicas, through Ray: on this machine or on a cluster.

    pool                                 Ray itself, and a pool of actors
    concept_table, teach, teach_worker   teach a CSV of concepts
    prompts, paint, paint_worker         generate a file of prompts; run_log: the lines that are done
    engine, replica                      inference backends of the server's gateway in other processes
    distill                              one student, trained by many workers

Results are files (concepts, images, a run log), never in the cluster's memory: workers, nodes and the driver
may die at any moment, and the same command resumes. Needs `minikin[ray]`, except for `cluster=None`, which
does the same work in this process, one item after the other.
"""
