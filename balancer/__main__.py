"""python -m balancer: the same program as `gpu-balancer`."""

from balancer.cli import main

if __name__ == "__main__":
    main()
