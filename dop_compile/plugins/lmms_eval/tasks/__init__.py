"""Where lmms-eval looks for the tasks of a plugin named in LMMS_EVAL_PLUGINS; there are none of our own."""
