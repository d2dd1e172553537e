"""One trial as it is usually written: a script in a process of its own, images read from class folders in every epoch, default `fit`.

    python bench/usual_trial.py path/to/clothing '{"filters": 32, "strategy": "same", …}'

Prints {"valid_top1": of the best epoch, "parameters": number of weights}. And as somebody writes it who runs many: a process that stays, with
the decoded images in memory (`tf.data`'s `cache`), which takes a trial a line. `bench/sweep.py` runs both.

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

def images(split, config, **more):
    return keras.utils.image_dataset_from_directory(f'{args.folder}/{split}', image_size=(config['size'],)*2, verbose=False, **more)

def read_each_time(config):
    found = {s: images(s, config, batch_size=config['batch_size'], shuffle=s == 'train', seed=config['seed']) for s in ('train', 'validation')}
    return found['train'], found['validation'], len(found['train'].class_names)

@cache
def decoded(split, size):
    "Decoded once, uint8 in memory; and how many there are, in how many classes"
    data = images(split, {'size': size}, batch_size=None, shuffle=False)
    return data.map(lambda x, y: (tf.cast(tf.round(x), tf.uint8), y)).cache(), len(data.file_paths), len(data.class_names)

def cached(config):
    (train, n, n_classes), (valid, _, _) = (decoded(s, config['size']) for s in ('train', 'validation'))
    train = train.shuffle(n, seed=config['seed']).batch(config['batch_size']).prefetch(tf.data.AUTOTUNE)
    return train, valid.batch(config['batch_size']).prefetch(tf.data.AUTOTUNE), n_classes

def network(config, n_classes):
    size = config['size']
    x = inputs = keras.Input((size, size, 3))
    x = layers.Rescaling(1/255)(x)
    if config['augment']:
        for moved in (layers.RandomFlip('horizontal'), layers.RandomTranslation(0.08, 0.08), layers.RandomRotation(0.024), layers.RandomZoom(0.1)): x = moved(x)
    for k in range(5):
        filters = {'same': config['filters'], 'half': max(8, config['filters'] >> k), 'pyramid': config['filters'] << k}[config['strategy']]
        x = layers.Conv2D(filters, config['filter_size'], padding='same', use_bias=not config['batch_norm'])(x)
        if config['batch_norm']: x = layers.BatchNormalization()(x)
        x = layers.MaxPooling2D()(layers.Activation(config['activation'])(x))
    x = layers.Dense(config['dense'], config['activation'])(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(n_classes, 'softmax', dtype='float32')(layers.Dropout(config['dropout'])(x)))

def trial(config, data):
    keras.backend.clear_session()
    keras.utils.set_random_seed(config['seed'])
    train, valid, n_classes = data(config)
    model = network(config, n_classes)
    model.compile(keras.optimizers.Adam(config['lr']), 'sparse_categorical_crossentropy', metrics=['accuracy'])
    history = model.fit(train, validation_data=valid, epochs=config['epochs'], verbose=0).history
    print(json.dumps({'valid_top1': max(history['val_accuracy']), 'parameters': model.count_params()}), flush=True)

keras.config.set_dtype_policy(args.policy)
if args.serve:
    for line in sys.stdin: trial(json.loads(line), cached)
else: trial(json.loads(args.config), read_each_time)
