"""Workers of a job: started, watched and restarted, on a cluster or as a process of this machine."""
