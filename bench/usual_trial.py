"""A trial as usually written: a script that reads images from class folders in every epoch, with default `fit`.

    python bench/usual_trial.py path/to/clothing '{"filters": 32, "strategy": "same", …}'

Prints {"valid_top1": of the best epoch, "parameters": number of weights}. With `--serve`, as written by someone who
runs many trials: a persistent process that caches the decoded images in memory (`tf.data`'s `cache`) and reads a
trial from each line of standard input. `bench/sweep.py` runs both.

    python bench/usual_trial.py path/to/clothing --serve --policy mixed_bfloat16
"""
import argparse, json, os, sys
from functools import cache

os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
import keras
import tensorflow as tf
from keras import layers

parser = argparse.ArgumentParser()
parser.add_argument('folder')
parser.add_argument('config', nargs='?', help='JSON')
parser.add_argument('--serve', action='store_true')
parser.add_argument('--policy', default='float32', help='float32 or mixed_bfloat16 (%(default)s)')
args = parser.parse_args()

def images(split, config, **kwargs):
    return keras.utils.image_dataset_from_directory(f'{args.folder}/{split}', image_size=(config['size'],)*2,
                                                    verbose=False, **kwargs)

def uncached(config):
    shared = {'batch_size': config['batch_size'], 'seed': config['seed']}
    train = images('train', config, shuffle=True, **shared)
    valid = images('validation', config, shuffle=False, **shared)
    return train, valid, len(train.class_names)

@cache
def decoded(split, size):
    "Decoded images as uint8, cached in memory; number of images, number of classes"
    data = images(split, {'size': size}, batch_size=None, shuffle=False)
    pixels = data.map(lambda x, y: (tf.cast(tf.round(x), tf.uint8), y)).cache()
    return pixels, len(data.file_paths), len(data.class_names)

def cached(config):
    (train, n, n_classes), (valid, _, _) = (decoded(split, config['size']) for split in ('train', 'validation'))
    train = train.shuffle(n, seed=config['seed']).batch(config['batch_size']).prefetch(tf.data.AUTOTUNE)
    return train, valid.batch(config['batch_size']).prefetch(tf.data.AUTOTUNE), n_classes

def network(config, n_classes):
    size = config['size']
    x = inputs = keras.Input((size, size, 3))
    x = layers.Rescaling(1/255)(x)
    if config['augment']:
        for layer in (layers.RandomFlip('horizontal'), layers.RandomTranslation(0.08, 0.08),
                      layers.RandomRotation(0.024), layers.RandomZoom(0.1)): x = layer(x)
    width = config['filters']
    for k in range(5):
        filters = {'same': width, 'half': max(8, width >> k), 'pyramid': width << k}[config['strategy']]
        x = layers.Conv2D(filters, config['filter_size'], padding='same', use_bias=not config['batch_norm'])(x)
        if config['batch_norm']: x = layers.BatchNormalization()(x)
        x = layers.MaxPooling2D()(layers.Activation(config['activation'])(x))
    x = layers.Dense(config['dense'], config['activation'])(layers.Flatten()(x))
    x = layers.Dropout(config['dropout'])(x)
    return keras.Model(inputs, layers.Dense(n_classes, 'softmax', dtype='float32')(x))

def run_trial(config, load_data):
    keras.backend.clear_session()
    keras.utils.set_random_seed(config['seed'])
    train, valid, n_classes = load_data(config)
    model = network(config, n_classes)
    optimizer = keras.optimizers.Adam(config['lr'])
    model.compile(optimizer, 'sparse_categorical_crossentropy', metrics=['accuracy'])
    history = model.fit(train, validation_data=valid, epochs=config['epochs'], verbose=0).history
    result = {'valid_top1': max(history['val_accuracy']), 'parameters': model.count_params()}
    print(json.dumps(result), flush=True)

keras.config.set_dtype_policy(args.policy)
if args.serve:
    for line in sys.stdin: run_trial(json.loads(line), cached)
else: run_trial(json.loads(args.config), uncached)
