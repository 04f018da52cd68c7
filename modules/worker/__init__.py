"""The process that holds a model. Started as ``python -m modules.worker``; nothing else imports it."""
