"""Tables on object storage, whatever is in them: their schemas, manifests, readers and order."""
