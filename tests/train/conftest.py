import plain_ops

plain_ops.install()
