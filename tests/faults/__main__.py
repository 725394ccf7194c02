"""``make faults``: break storage, kill servers, cut off hosts, and check that nothing is lost."""

from tests.faults import hosts, registry, storage, suite, training

scores = [each.run() for each in (storage, training, registry, hosts)]
suite.finish(*(sum(each) for each in zip(*scores, strict=True)))
