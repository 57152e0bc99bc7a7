"ImageNet-1k as folders: data_scripts/imagenet1k.py --root DIR --source TAR_OR_FOLDER"

import sys

from glsd.data.fetching import command

if __name__ == '__main__':
    sys.exit(command('imagenet1k'))
