"""Names of images, as Docker reads them."""


def registry(image: str) -> str:
    """The registry that an image is pulled from: what stands before the first slash where that is a host, else Docker's own."""
    first, slash, _ = image.partition("/")
    return first if slash and ("." in first or ":" in first or first == "localhost") else "docker.io"
