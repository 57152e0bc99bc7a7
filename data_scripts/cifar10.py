"CIFAR-10 as folders of PNG files: data_scripts/cifar10.py --root DIR [--source ARCHIVE_OR_FOLDER_OR_URL]"

import sys

from glsd.data.fetching import command

if __name__ == '__main__':
    sys.exit(command('cifar10'))
