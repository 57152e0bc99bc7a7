"The 1 to 20 % subsets of ImageNet-1k: data_scripts/imagenet_subsets.py --root DIR --source TAR_OR_FOLDER"

import sys

from glsd.data.fetching import command

if __name__ == '__main__':
    sys.exit(command('imagenet_subsets'))
