"Tiny-ImageNet as folders: data_scripts/tiny_imagenet.py --root DIR [--source ARCHIVE_OR_FOLDER_OR_URL]"

import sys

from glsd.data.fetching import command

if __name__ == '__main__':
    sys.exit(command('tiny_imagenet'))
