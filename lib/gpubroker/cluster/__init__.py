"""What is known of Kubernetes: calls to its API, the objects that make a pod, what their states mean, GPUs of nodes.

An instance is a ConfigMap, its record, named by the reference. All else belongs to the record and goes with it: a Job for
each run (`activeDeadlineSeconds` ends it at the hard stop without us), a Secret with the environment, Services and a
NetworkPolicy for its ports, a volume. The record outlives them for a day, so that one look proves the end.
"""
