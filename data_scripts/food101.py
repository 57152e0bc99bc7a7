"Food-101 as folders of JPEG files: data_scripts/food101.py --root DIR [--source ARCHIVE_OR_FOLDER_OR_URL]"

import sys

from glsd.data.fetching import command

if __name__ == '__main__':
    sys.exit(command('food101'))
