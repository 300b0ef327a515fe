"""Tables on object storage, independent of what they hold: schemas, manifests, readers and sample order."""
