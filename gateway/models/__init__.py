"""Models' files on their way: from a hub, into a tarball, into a bucket, and how a platform is told of them."""
