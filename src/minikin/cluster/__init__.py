"""Many concepts, many prompts, many replicas, through Ray: on this machine or on a cluster.

    cluster                        Ray itself, and a crew of workers
    manifests, teaching, teacher   a CSV of concepts
    prompts, painting, painter     a file of prompts; manifest: what of it is done
    engine, replica                what the server's gateway paints with
    distilling                     one student, by many

What is done is in files (concepts, images, a manifest), never in the cluster's memory: workers, nodes and
the program that sent the work may die at any moment, and the same command goes on. Needs `minikin[ray]`,
but for `cluster=None`, which does the same work in this process, one piece after the other.
"""
