"""The operator's own machine as a vendor: what `gpubroker.providers.local` rents out.

```
rental     what is rented out, from the settings; grants a share and makes the pod's folder
capacity   what the machine has, what the pods hold, the sizes that are offered; gpus asks NVML
engine     Podman or Docker: whether one answers, and what it is asked
control    from an adapter to a supervisor: one question, one answer; starts a supervisor where none is
folder     a pod's folder on disk: its spec, its birth in one step, where it lies when it is gone
record     what ran when: the append-only truth of a pod, and the bill that follows from it
supervisor one process per pod, from its birth to its end; needs nobody else (`python __main__.py FOLDER`)
  server   its poll loop and the other end of `control`
  run      one run of the program, with the commands beside it (execs) and its output (journal)
  container of a pod with an image: how it is made (keeper), and a run of it in place of a tree
  tree     a run's processes as it holds them; init is their first, in namespaces (jail) and limits (cgroup)
  kernel   the system calls that Python lacks; processes finds and ends what has no namespace
```

`rental`, `gpus` and `control` belong to the adapter's side. All others run inside supervisors too, and import nothing but
light parts of the standard library: a supervisor starts in 50 ms and takes 12 MB, of which 5 are its own. Only that of a
pod with an image loads `container` and `engine`.

What a pod can do: it runs as the user of the broker. A namespace keeps its processes together, gives it a /proc of its
own and hides the broker's files; no setuid program helps it, and a broker of root gives it few of root's capabilities.
That guards against mistakes and curiosity. It is no wall against an attacker who is after the kernel, and the network
is the machine's: let strangers run code on machines of their own.
"""
