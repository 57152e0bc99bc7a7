"ImageNet-100, the list of CMC, as folders: data_scripts/imagenet100.py --root DIR --source TAR_OR_FOLDER"

import sys

from glsd.data.fetching import command

if __name__ == '__main__':
    sys.exit(command('imagenet100'))
