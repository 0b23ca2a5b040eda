"""Everything between a prepared dataset and a finished run."""

from trainer.runtime.folders import keep_caches_together

# Here, since matplotlib and Keras look at the variables when they are imported.
keep_caches_together()
