"""One trial as it is usually written: a script in a process of its own, images read from class folders in every epoch, default `fit`.

    python bench/usual_trial.py path/to/clothing '{"filters": 32, "strategy": "same", …}'

Prints {"valid_top1": of the best epoch, "parameters": number of weights}. `bench/sweep.py` runs it.
"""
import json, os, sys

os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
import keras
from keras import layers

folder, config = sys.argv[1], json.loads(sys.argv[2])
size = config['size']

def images(split): return keras.utils.image_dataset_from_directory(f'{folder}/{split}', image_size=(size, size), batch_size=config['batch_size'],
                                                                   shuffle=split == 'train', seed=config['seed'], verbose=False)

def network(n_classes):
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
    return keras.Model(inputs, layers.Dense(n_classes, 'softmax')(layers.Dropout(config['dropout'])(x)))

keras.utils.set_random_seed(config['seed'])
train, valid = images('train'), images('validation')
model = network(len(train.class_names))
model.compile(keras.optimizers.Adam(config['lr']), 'sparse_categorical_crossentropy', metrics=['accuracy'])
history = model.fit(train, validation_data=valid, epochs=config['epochs'], verbose=0).history
print(json.dumps({'valid_top1': max(history['val_accuracy']), 'parameters': model.count_params()}))
